"""/v1/adapters: versions and their files, promotion, rollback, and data for the next nightly run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from loramill.client.adapter_folder import TOKENIZER_FILES
from loramill.errors import InvalidRequest, NotFound
from loramill.models.catalog import Base
from loramill.names import SHORT, AdapterName
from loramill.registry import adapters, evaluations, jobs, nightly
from loramill.serve.api.dependencies import Gateway, Here, Who
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.audit import note
from loramill.serve.api.routes.references import find_file, named_by
from loramill.serve.api.schemas.common import Body, list_of
from loramill.types import AdapterRecord, Alias, DatasetRecord, Value, VersionRecord

router = APIRouter(tags=["adapters"])

PATH = "/v1/adapters/{tenant}/{adapter}"


class Promotion(Body):
    """Which version becomes the champion: an alias, or a version's id or the first 8 digits of it or more."""

    version: str


class NewData(Body):
    """Files that the next nightly run trains on."""

    training_file: str
    validation_file: str | None = None


class Wanted(BaseModel):
    """The query for a version's files: which version, and whether its files or a full fine-tune's whole weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Alias.CHAMPION.value
    full: bool = False


Files = Annotated[Wanted, Query()]

#: Bytes of a file that are sent at once.
_CHUNK = 1 << 20


@router.get("/v1/adapters")
def list_adapters(here: Here, who: Who) -> dict[str, Any]:
    """The caller's adapters."""
    with here.registry.reading() as session:
        return list_of(adapters.list_of(session, who.tenant), adapter_object)


@router.get(PATH)
def retrieve_adapter(tenant: str, adapter: str, here: Here, who: Who) -> dict[str, Any]:
    """An adapter with its versions, the history of its aliases, and its evaluations, each newest first."""
    name = allowed(who, tenant, adapter)
    with here.registry.reading() as session:
        return adapter_object(adapters.get(session, name)) | {
            "versions": _dump(adapters.versions(session, name)),
            "history": _dump(adapters.history(session, name)),
            "evaluations": _dump(evaluations.list_of(session, name)),
        }


@router.get(PATH + "/files")
def list_files(tenant: str, adapter: str, wanted: Files, here: Here, who: Who) -> dict[str, Any]:
    """A version's files with their sizes and hashes, and the artifact's hash over all of them.

    `base` is the base that the version is an adapter for, and the tokenizer files that can be downloaded with it; it is
    null if that base isn't served here.
    """
    name = allowed(who, tenant, adapter)
    with here.registry.reading() as session:
        version, artifact = _find(session, name, wanted)
    manifest = here.registry.artifacts.manifest(artifact)
    files = {file: {"sha256": entry.sha256, "bytes": entry.bytes} for file, entry in manifest.files.items()}
    return {
        "object": "adapter.files",
        "adapter": str(name),
        "version": version.id,
        "artifact": artifact,
        "files": files,
        "base": _base_files(here, version),
    }


@router.get(PATH + "/files/{file}")
def retrieve_file(tenant: str, adapter: str, file: str, wanted: Files, here: Here, who: Who) -> StreamingResponse:
    """One file's bytes, also one of the base's tokenizer; check a version's files against their hashes."""
    name = allowed(who, tenant, adapter)
    with here.registry.reading() as session:
        version, artifact = _find(session, name, wanted)
    if file not in here.registry.artifacts.manifest(artifact).files:
        base = None if wanted.full else _base_of(here, version)
        if base is not None and file in TOKENIZER_FILES and (base.folder / file).is_file():
            return StreamingResponse(_chunks((base.folder / file).open("rb")), media_type="application/octet-stream")
        raise NotFound(f"The version has no file '{file}'.", param="file")
    content = here.registry.artifacts.open(artifact, file)
    return StreamingResponse(_chunks(content), media_type="application/octet-stream")


@router.post(PATH + "/promote")
def promote(tenant: str, adapter: str, body: Promotion, here: Here, who: Who) -> dict[str, Any]:
    """Makes a version the champion: the one that answers from the next request on."""
    name = allowed(who, tenant, adapter)
    with here.registry.writing() as session:
        adapters.get(session, name)
        with named_by("version"):
            version = adapters.resolve(session, name, body.version)
        promoted = adapters.promote(session, name, version.id, f"promoted with {who.key}")
        note(session, who, "adapter.promote", str(name), tenant, version=version.id)
        return adapter_object(promoted)


@router.post(PATH + "/rollback")
def rollback(tenant: str, adapter: str, here: Here, who: Who) -> dict[str, Any]:
    """Makes the previous champion the champion again."""
    name = allowed(who, tenant, adapter)
    with here.registry.writing() as session:
        rolled_back = adapters.rollback(session, name, f"rolled back with {who.key}")
        note(session, who, "adapter.rollback", str(name), tenant, version=rolled_back.champion)
        return adapter_object(rolled_back)


@router.get(PATH + "/data")
def list_data(tenant: str, adapter: str, here: Here, who: Who) -> dict[str, Any]:
    """The adapter's data for nightly runs, newest first; `run` is null while the data waits for the next run."""
    name = allowed(who, tenant, adapter)
    with here.registry.reading() as session:
        return list_of(nightly.data_of(session, name), lambda data: data.model_dump() | {"object": "adapter.data"})


@router.post(PATH + "/data")
def add_data(tenant: str, adapter: str, body: NewData, here: Here, who: Who) -> dict[str, Any]:
    """Adds examples for the next nightly run to train the adapter on. The adapter is created if it does not exist.

    `new_data` in the answer describes all data that waits, and whether it is enough.
    """
    name = allowed(who, tenant, adapter)
    _check_forms(here, name, body)
    with here.registry.writing() as session:
        find_file(session, body.training_file, tenant, "training_file")
        if body.validation_file is not None:
            find_file(session, body.validation_file, tenant, "validation_file")
        nightly.add_data(session, name, body.training_file, body.validation_file)
        note(session, who, "adapter.data", str(name), tenant, train=body.training_file, valid=body.validation_file)
        waiting = nightly.waiting(session, name, here.settings.jobs.min_examples)
        return adapter_object(adapters.get(session, name)) | {"new_data": waiting.model_dump(mode="json")}


def _check_forms(here: Gateway, name: AdapterName, body: NewData) -> None:
    """Refuses new data that a nightly run can't train on together with what the adapter has: a job takes one form.

    Raises:
        InvalidRequest: there is no such file, or one holds messages and another prompts and completions.
    """
    with here.registry.reading() as session:
        train = find_file(session, body.training_file, name.tenant, "training_file")
        ids = [body.validation_file] if body.validation_file is not None else []
        valid = [find_file(session, each, name.tenant, "validation_file") for each in ids]
        there = nightly.beside(session, name)
    chat = here.readings.chat(train)
    for param, file, others in (("validation_file", train, valid), ("training_file", train, there)):
        for other in others:
            if here.readings.chat(other) != chat:
                raise InvalidRequest(_other_form(file, other, name, chat=chat), param=param)


def _other_form(file: DatasetRecord, other: DatasetRecord, name: AdapterName, *, chat: bool) -> str:
    mine, its = ("messages", "prompts and completions") if chat else ("prompts and completions", "messages")
    columns, drop = "--columns instruction=prompt,output=completion", f"loramill nightly drop {name}"
    return (
        f"{file.filename} holds {mine}, but {other.filename}, which '{name}' uses too, holds {its}; a nightly run "
        f"needs one form: `{columns}` makes messages of prompts and completions, and `{drop}` takes out what waits."
    )


def allowed(who: Caller, tenant: str, adapter: str) -> AdapterName:
    """The adapter's name, if the caller may use what is called so.

    Raises:
        Forbidden: it is another tenant's, whether it exists or not.
        InvalidRequest: it is no name.
    """
    who.check_adapter(tenant)
    return AdapterName.parse(f"{tenant}/{adapter}")


def _find(session: Session, name: AdapterName, wanted: Wanted) -> tuple[VersionRecord, str]:
    """The version and the artifact that are wanted.

    Raises:
        NotFound: there is no such adapter or version, or it isn't of a full fine-tune.
    """
    adapters.get(session, name)
    version = adapters.resolve(session, name, wanted.version)
    if not wanted.full:
        return version, version.id
    result = jobs.get(session, version.job).result if version.job else None
    if result is None:
        raise NotFound(
            f"{name.at(version.id)} wasn't made by full fine-tuning, so it has no whole weights: leave 'full' out, or "
            f"merge it (`loramill adapters merge {name}@{version.id[:SHORT]}`).",
            param="full",
        )
    return version, result


def _base_of(here: Gateway, version: VersionRecord) -> Base | None:
    return next((each.base for each in here.served.values() if each.base.fingerprint == version.base), None)


def _base_files(here: Gateway, version: VersionRecord) -> dict[str, Any] | None:
    base = _base_of(here, version)
    if base is None:
        return None
    tokenizer = [file for file in TOKENIZER_FILES if (base.folder / file).is_file()]
    return {"name": base.name, "source": base.source, "tokenizer": tokenizer}


def _chunks(content: BinaryIO) -> Iterator[bytes]:
    with content:
        while chunk := content.read(_CHUNK):
            yield chunk


def adapter_object(record: AdapterRecord) -> dict[str, Any]:
    """An adapter on the wire."""
    return record.model_dump() | {"id": record.name, "object": "adapter"}


def _dump(records: Sequence[Value]) -> list[dict[str, Any]]:
    return [record.model_dump(mode="json") for record in records]
