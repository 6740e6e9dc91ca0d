"""What the endpoints answer, as the description tells it; answers are not checked against these while serving."""

from __future__ import annotations

from typing import Generic, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from loramill.types import (
    AdapterData,
    AdapterRecord,
    AliasChange,
    AuditRecord,
    DeletionSummary,
    EvaluationRecord,
    KeyRecord,
    NewDataState,
    TenantRecord,
    UsageRecord,
    VersionRecord,
)

_T = TypeVar("_T")
#: No other keys than these.
no_extra_keys = with_config(ConfigDict(extra="forbid"))

#: A record is shown with all of its fields, those that have a default too.
_ALL_FIELDS_REQUIRED = ConfigDict(json_schema_serialization_defaults_required=True)


@no_extra_keys
class ErrorDetail(TypedDict):
    """What went wrong: where, and what to do. `param` is the parameter at fault, if it is one."""

    message: str
    type: str
    param: str | None
    code: str


@no_extra_keys
class Error(TypedDict):
    """An error, as OpenAI writes it."""

    error: ErrorDetail


@no_extra_keys
class ListObject(TypedDict, Generic[_T]):
    """A list, or a page of one: the next page begins `after` the `last_id`."""

    object: Literal["list"]
    data: list[_T]
    has_more: bool
    first_id: NotRequired[str | int | None]
    last_id: NotRequired[str | int | None]


@no_extra_keys
class ModelObject(TypedDict):
    """A name that can be asked; `version` is what it stands for now, if an adapter's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: NotRequired[str | None]


@no_extra_keys
class FileExtension(TypedDict):
    """Fields that OpenAI's file object does not have; `reused` if the upload had the content of this file."""

    tenant: str
    examples: int
    reused: NotRequired[Literal[True]]


@no_extra_keys
class File(TypedDict):
    """A dataset, or a job's results. After an upload, `status_details` has what is odd about it, a line each."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"]
    status_details: str | None
    loramill: NotRequired[FileExtension]


@no_extra_keys
class FileTokens(TypedDict):
    """Tokens of a file's sequences; an example may have several."""

    min: int
    median: int
    max: int
    total: int


@no_extra_keys
class PreviewPart(TypedDict):
    """A part of an example as the base's chat template renders it, and whether the loss is computed on it."""

    text: str
    supervised: bool


@no_extra_keys
class FileCheck(TypedDict):
    """What would be trained from a file, which is not stored; `preview` is its first example."""

    object: Literal["file.check"]
    filename: str
    bytes: int
    examples: int
    status_details: str | None
    tokens: FileTokens
    supervised_tokens: int
    preview: list[PreviewPart]


@no_extra_keys
class FileDeleted(TypedDict):
    """A file that is no more."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


@no_extra_keys
class ModelDeleted(TypedDict):
    """A deleted model."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class AdapterDeleted(DeletionSummary):
    """A deleted adapter, and what was deleted with it."""

    model_config = _ALL_FIELDS_REQUIRED

    id: str
    object: Literal["adapter"]
    deleted: Literal[True]


@no_extra_keys
class VersionDeleted(TypedDict):
    """A deleted version."""

    id: str
    object: Literal["adapter.version"]
    deleted: Literal[True]


class TenantDeleted(DeletionSummary):
    """A deleted tenant, and what was deleted with it."""

    model_config = _ALL_FIELDS_REQUIRED

    id: str
    object: Literal["tenant"]
    deleted: Literal[True]


class Adapter(AdapterRecord):
    """An adapter with where its aliases point now; `id` is its name."""

    model_config = _ALL_FIELDS_REQUIRED

    id: str
    object: Literal["adapter"]


class AdapterDataObject(AdapterData):
    """An adapter's data for nightly runs."""

    model_config = _ALL_FIELDS_REQUIRED

    object: Literal["adapter.data"]


class AdapterWithData(Adapter):
    """An adapter that got new data, and the state of all data that waits for its next nightly run."""

    new_data: NewDataState


class ImportedAdapter(Adapter):
    """An adapter with an imported version, and that version."""

    version: str


class AdapterHistory(Adapter):
    """An adapter with all there is to know of it, each newest first."""

    versions: list[VersionRecord]
    history: list[AliasChange]
    evaluations: list[EvaluationRecord]


@no_extra_keys
class AdapterFile(TypedDict):
    """A file's hash and size."""

    sha256: str
    bytes: int


@no_extra_keys
class AdapterBase(TypedDict):
    """The base of a version: `source` is a hub id or a folder; `tokenizer` lists files that can be downloaded."""

    name: str
    source: str
    tokenizer: list[str]


@no_extra_keys
class AdapterFiles(TypedDict):
    """A version's files by name, and the hash over all of them, its artifact's."""

    object: Literal["adapter.files"]
    adapter: str
    version: str
    artifact: str
    files: dict[str, AdapterFile]
    base: AdapterBase | None


class Tenant(TenantRecord):
    """A tenant."""

    model_config = _ALL_FIELDS_REQUIRED

    object: Literal["tenant"]


class CreatedTenant(Tenant):
    """A tenant of a request for many: whether it is new, and its key, shown this once, if one was made."""

    new: bool
    key_id: str | None
    key: str | None


class Key(KeyRecord):
    """An API key without its secret."""

    model_config = _ALL_FIELDS_REQUIRED

    object: Literal["key"]


class CreatedKey(Key):
    """An API key, with the secret that is shown this once."""

    key: str


class RevokedKey(Key):
    """An API key that is worthless."""

    deleted: Literal[True]


@no_extra_keys
class AdapterWarm(TypedDict):
    """How long a version took to answer with one token; loaded, it takes less."""

    object: Literal["adapter.warm"]
    adapter: str
    version: str
    seconds: float


class DailyUsage(UsageRecord):
    """What a tenant asked of a model on one day."""

    object: Literal["usage"]


class AuditChange(AuditRecord):
    """One change that somebody made through the API."""

    model_config = _ALL_FIELDS_REQUIRED

    object: Literal["audit.change"]


@no_extra_keys
class Health(TypedDict):
    """How the gateway is."""

    status: Literal["ok", "ready"]
