"""Requests and responses about adapters, their versions, and models."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from fastapi import Query, UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from loramill.serve.api.schemas.common import (
    ALL_FIELDS,
    CreatedAt,
    Deleted,
    ObjectType,
    RequestBody,
    response_object,
    without_nul,
)
from loramill.types import (
    AdapterData,
    AdapterRecord,
    Alias,
    AliasChange,
    Approval,
    DeletionSummary,
    EvaluationRecord,
    NewDataState,
    Removal,
    RetentionPolicy,
    RolloutState,
    VersionRecord,
)

_VERSION = "An alias, or the version's ID or at least its first 8 digits."


class PromotionRequest(RequestBody):
    """The version that becomes the champion."""

    version: str = Field(description=_VERSION)


class VersionSelector(RequestBody):
    """A version of the adapter."""

    version: str = Field(default=Alias.CHAMPION.value, description=f"{_VERSION} Default: the champion.")


class NewDataRequest(RequestBody):
    """Files that the next nightly run trains on."""

    training_file: str = Field(description="ID of a file with training examples.")
    validation_file: str | None = Field(default=None, description="ID of a file with validation examples.")


class CanaryRequest(RequestBody):
    """The share of an adapter's requests that its challenger answers."""

    share: float = Field(ge=0, le=1, description="Share of the requests, 0 to 1.")
    shadow: bool = Field(
        default=False,
        description="The challenger answers copies of the share instead, which are compared with the champion's and "
        "not sent.",
    )
    version: str | None = Field(
        default=None, description=f"{_VERSION} It becomes the challenger. Default: the challenger."
    )
    promote_after_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Seconds after which the challenger is promoted, unless it is worse. Default: never; for an open "
        "canary, as before.",
    )
    min_requests: int | None = Field(
        default=None,
        ge=1,
        description="Number of requests from which the versions are compared. Default: 50; for an open canary, as "
        "before.",
    )

    def changes(self) -> dict[str, float]:
        """The fields of a `WatchPolicy` that the request sets."""
        given = {"window_seconds": self.promote_after_seconds, "min_requests": self.min_requests}
        return {name: value for name, value in given.items() if value is not None}


class ApprovalRequest(RequestBody):
    """The decision about a challenger that passed the gate of a nightly run."""

    run: Annotated[str, AfterValidator(without_nul)] = Field(description="ID of the nightly run.")
    decision: Literal["approve", "reject"] = Field(description="Whether the challenger takes over or is dropped.")
    note: Annotated[str, AfterValidator(without_nul)] = Field(
        default="", max_length=500, description="Why; the report of the run shows it."
    )


class RenameRequest(RequestBody):
    """An adapter's new name."""

    to: str = Field(description="The new name, `tenant/adapter`, with the same tenant.")


class RetentionTerms(RequestBody, RetentionPolicy):
    """Which versions of an adapter are kept. What is not given is unset."""


class RetentionRequest(RequestBody):
    """The retention of an adapter."""

    retention: RetentionTerms | None = Field(
        default=None, description="Which versions are kept. Default: those that the settings keep."
    )


class PruneRequest(RequestBody):
    """How versions are removed."""

    dry_run: bool = Field(default=False, description="Only list what would be removed.")


class ImportForm(BaseModel):
    """The files that PEFT's `save_pretrained` writes."""

    model_config = ConfigDict(extra="forbid")
    config: UploadFile = Field(description="The file adapter_config.json.")
    weights: UploadFile = Field(description="The file adapter_model.safetensors.")
    promote: bool = Field(default=False, description="Promote the version to champion.")


class VersionFilesQuery(BaseModel):
    """The query for a version's files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Field(default=Alias.CHAMPION.value, description=f"{_VERSION} Default: the champion.")
    full: bool = Field(default=False, description="The whole weights of a full fine-tune, instead of the adapter.")


VersionFilesParam = Annotated[VersionFilesQuery, Query()]


class DeletionQuery(BaseModel):
    """The query of a deletion that may affect jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cancel_jobs: bool = Field(
        default=False, description="Cancel jobs that have not ended. Without it, they are a conflict (409)."
    )


class VersionDeletionQuery(BaseModel):
    """The query of the deletion of a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    force: bool = Field(
        default=False, description="Delete the version even if it is the challenger or the previous champion."
    )


@response_object
class ModelObject(TypedDict):
    """A model that can be used."""

    id: Annotated[str, Field(description="Name of the model.")]
    object: ObjectType[Literal["model"]]
    created: CreatedAt
    owned_by: Annotated[str, Field(description="The adapter's tenant, or `loramill` for a base.")]
    version: NotRequired[
        Annotated[str | None, Field(description="Version that the name refers to now; null: the base model.")]
    ]


@response_object
class ModelDeleted(TypedDict):
    """A deleted model."""

    id: Annotated[str, Field(description="Name of the model.")]
    object: ObjectType[Literal["model"]]
    deleted: Deleted


class AdapterDeleted(DeletionSummary):
    """A deleted adapter, and what was deleted with it."""

    model_config = ALL_FIELDS

    id: str = Field(description="Name of the adapter.")
    object: ObjectType[Literal["adapter"]]
    deleted: Deleted


@response_object
class VersionDeleted(TypedDict):
    """A deleted version."""

    id: Annotated[str, Field(description="Name of the version, `tenant/adapter@version`.")]
    object: ObjectType[Literal["adapter.version"]]
    deleted: Deleted


class AdapterRemoval(Removal):
    """A version that is removed, or would be."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["adapter.removal"]]


class Adapter(AdapterRecord):
    """An adapter, and the versions that its aliases point to."""

    model_config = ALL_FIELDS

    id: str = Field(description="Name of the adapter.")
    object: ObjectType[Literal["adapter"]]


class AdapterDataObject(AdapterData):
    """Data of an adapter for nightly runs."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["adapter.data"]]


class AdapterWithData(Adapter):
    """An adapter that got new data."""

    new_data: NewDataState = Field(description="All data that waits for the adapter's next nightly run.")


class ImportedAdapter(Adapter):
    """An adapter with an imported version."""

    version: str = Field(description="ID of the imported version.")


class AdapterRollout(RolloutState):
    """A canary, a shadow or a watch of an adapter, with what was measured."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["adapter.rollout"]]


class AdapterApproval(Approval):
    """A challenger that waits for a person, or waited for one."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["adapter.approval"]]


class AdapterHistory(Adapter):
    """An adapter with its history."""

    versions: list[VersionRecord] = Field(description="Its versions, newest first.")
    history: list[AliasChange] = Field(description="Changes of its aliases, newest first.")
    evaluations: list[EvaluationRecord] = Field(description="Its evaluations, newest first.")
    rollouts: list[AdapterRollout] = Field(description="Its last 20 rollouts, newest first.")


@response_object
class AdapterFile(TypedDict):
    """A file's hash and size."""

    sha256: Annotated[str, Field(description="SHA-256 of the content, in hex.")]
    bytes: Annotated[int, Field(description="Size in bytes.")]


@response_object
class AdapterBase(TypedDict):
    """The base model of a version."""

    name: Annotated[str, Field(description="Name of the base.")]
    source: Annotated[str, Field(description="ID on a model hub, or a folder.")]
    tokenizer: Annotated[list[str], Field(description="Tokenizer files that can be downloaded like the version's.")]


@response_object
class AdapterFiles(TypedDict):
    """The files of a version."""

    object: ObjectType[Literal["adapter.files"]]
    adapter: Annotated[str, Field(description="Name of the adapter.")]
    version: Annotated[str, Field(description="ID of the version.")]
    artifact: Annotated[str, Field(description="ID of the artifact: the hash over all files.")]
    files: Annotated[dict[str, AdapterFile], Field(description="The files by name.")]
    base: Annotated[AdapterBase | None, Field(description="The base model; null: it is not served here.")]


@response_object
class AdapterWarm(TypedDict):
    """A loaded version."""

    object: ObjectType[Literal["adapter.warm"]]
    adapter: Annotated[str, Field(description="Name of the adapter.")]
    version: Annotated[str, Field(description="ID of the version.")]
    seconds: Annotated[float, Field(description="Duration of the request that loaded it, for one token.")]
