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
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.registry import adapters, evaluations, jobs, nightly
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import RequestBody, list_object
from loramill.submission.references import find_file, named_by
from loramill.types import AdapterRecord, Alias, DatasetRecord, FrozenModel, VersionRecord

router = APIRouter(tags=["adapters"])

ADAPTER_PATH = "/v1/adapters/{tenant}/{adapter}"


class PromotionRequest(RequestBody):
    """Which version becomes the champion: an alias, or a version's id or the first 8 digits of it or more."""

    version: str


class NewDataRequest(RequestBody):
    """Files that the next nightly run trains on."""

    training_file: str
    validation_file: str | None = None


class VersionFilesQuery(BaseModel):
    """The query for a version's files: which version, and whether its files or a full fine-tune's whole weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Alias.CHAMPION.value
    full: bool = False


VersionFilesParam = Annotated[VersionFilesQuery, Query()]

#: Bytes of a file that are sent at once.
_CHUNK_BYTES = 1 << 20


@router.get("/v1/adapters")
def list_adapters(gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """The caller's adapters."""
    with gateway.registry.reading() as session:
        return list_object(adapters.list_adapters(session, caller.tenant), adapter_object)


@router.get(ADAPTER_PATH)
def retrieve_adapter(tenant: str, adapter: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """An adapter with its versions, the history of its aliases, and its evaluations, each newest first."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        return adapter_object(adapters.get(session, name)) | {
            "versions": _dump(adapters.list_versions(session, name)),
            "history": _dump(adapters.alias_history(session, name)),
            "evaluations": _dump(evaluations.list_evaluations(session, name)),
        }


@router.get(ADAPTER_PATH + "/files")
def list_files(
    tenant: str, adapter: str, query: VersionFilesParam, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """A version's files with their sizes and hashes, and the artifact's hash over all of them.

    `base` is the base that the version is an adapter for, and the tokenizer files that can be downloaded with it; it is
    null if that base isn't served here.
    """
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        version, artifact = _find_artifact(session, name, query)
    manifest = gateway.registry.artifacts.manifest(artifact)
    files = {file: {"sha256": entry.sha256, "bytes": entry.bytes} for file, entry in manifest.files.items()}
    return {
        "object": "adapter.files",
        "adapter": str(name),
        "version": version.id,
        "artifact": artifact,
        "files": files,
        "base": _base_files(gateway, version),
    }


@router.get(ADAPTER_PATH + "/files/{file}")
def retrieve_file(
    tenant: str, adapter: str, file: str, query: VersionFilesParam, gateway: GatewayDep, caller: CallerDep
) -> StreamingResponse:
    """One file's bytes, also one of the base's tokenizer; check a version's files against their hashes."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        version, artifact = _find_artifact(session, name, query)
    if file not in gateway.registry.artifacts.manifest(artifact).files:
        base = None if query.full else _served_base(gateway, version)
        if base is not None and file in TOKENIZER_FILES and (base.folder / file).is_file():
            return StreamingResponse(
                _iter_bytes((base.folder / file).open("rb")), media_type="application/octet-stream"
            )
        raise NotFound(f"The version has no file '{file}'.", param="file")
    content = gateway.registry.artifacts.open(artifact, file)
    return StreamingResponse(_iter_bytes(content), media_type="application/octet-stream")


@router.post(ADAPTER_PATH + "/promote")
def promote(
    tenant: str, adapter: str, body: PromotionRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Makes a version the champion: the one that answers from the next request on."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        adapters.get(session, name)
        with named_by("version"):
            version = adapters.resolve(session, name, body.version)
        promoted = adapters.promote(session, name, version.id, f"promoted with {caller.key_id}")
        record_change(session, caller, "adapter.promote", str(name), tenant, version=version.id)
        return adapter_object(promoted)


@router.post(ADAPTER_PATH + "/rollback")
def rollback(tenant: str, adapter: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Makes the previous champion the champion again."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        rolled_back = adapters.rollback(session, name, f"rolled back with {caller.key_id}")
        record_change(session, caller, "adapter.rollback", str(name), tenant, version=rolled_back.champion)
        return adapter_object(rolled_back)


@router.get(ADAPTER_PATH + "/data")
def list_data(tenant: str, adapter: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """The adapter's data for nightly runs, newest first; `run` is null while the data waits for the next run."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        return list_object(
            nightly.list_data(session, name), lambda data: data.model_dump() | {"object": "adapter.data"}
        )


@router.post(ADAPTER_PATH + "/data")
def add_data(tenant: str, adapter: str, body: NewDataRequest, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Adds examples for the next nightly run to train the adapter on. The adapter is created if it does not exist.

    `new_data` in the answer describes all data that waits, and whether it is enough.
    """
    name = authorized_name(caller, tenant, adapter)
    _check_formats(gateway, name, body)
    with gateway.registry.writing() as session:
        find_file(session, body.training_file, tenant, "training_file")
        if body.validation_file is not None:
            find_file(session, body.validation_file, tenant, "validation_file")
        nightly.add_data(session, name, body.training_file, body.validation_file)
        record_change(
            session, caller, "adapter.data", str(name), tenant, train=body.training_file, valid=body.validation_file
        )
        waiting = nightly.new_data_state(session, name, gateway.settings.jobs.min_examples)
        return adapter_object(adapters.get(session, name)) | {"new_data": waiting.model_dump(mode="json")}


def _check_formats(gateway: Gateway, name: AdapterName, body: NewDataRequest) -> None:
    """Refuses new data that a nightly run can't train on together with what the adapter has: a job takes one form.

    Raises:
        InvalidRequest: there is no such file, or one holds messages and another prompts and completions.
    """
    with gateway.registry.reading() as session:
        train = find_file(session, body.training_file, name.tenant, "training_file")
        ids = [body.validation_file] if body.validation_file is not None else []
        valid = [find_file(session, each, name.tenant, "validation_file") for each in ids]
        there = nightly.next_training_files(session, name)
    chat = gateway.dataset_checks.is_chat(train)
    for param, file, others in (("validation_file", train, valid), ("training_file", train, there)):
        for other in others:
            if gateway.dataset_checks.is_chat(other) != chat:
                raise InvalidRequest(_format_mismatch(file, other, name, chat=chat), param=param)


def _format_mismatch(file: DatasetRecord, other: DatasetRecord, name: AdapterName, *, chat: bool) -> str:
    mine, its = ("messages", "prompts and completions") if chat else ("prompts and completions", "messages")
    columns, drop = "--columns instruction=prompt,output=completion", f"loramill nightly drop {name}"
    return (
        f"{file.filename} holds {mine}, but {other.filename}, which '{name}' uses too, holds {its}; a nightly run "
        f"needs one form: `{columns}` makes messages of prompts and completions, and `{drop}` takes out what waits."
    )


def authorized_name(caller: Caller, tenant: str, adapter: str) -> AdapterName:
    """The adapter's name, if the caller may use what is called so.

    Raises:
        Forbidden: it is another tenant's, whether it exists or not.
        InvalidRequest: it is no name.
    """
    caller.check_adapter(tenant)
    return AdapterName.parse(f"{tenant}/{adapter}")


def _find_artifact(session: Session, name: AdapterName, query: VersionFilesQuery) -> tuple[VersionRecord, str]:
    """The version and the artifact that are wanted.

    Raises:
        NotFound: there is no such adapter or version, or it isn't of a full fine-tune.
    """
    adapters.get(session, name)
    version = adapters.resolve(session, name, query.version)
    if not query.full:
        return version, version.id
    result = jobs.get(session, version.job).result if version.job else None
    if result is None:
        raise NotFound(
            f"{name.at(version.id)} wasn't made by full fine-tuning, so it has no whole weights: leave 'full' out, or "
            f"merge it (`loramill adapters merge {name}@{version.id[:SHORT_HASH_LENGTH]}`).",
            param="full",
        )
    return version, result


def _served_base(gateway: Gateway, version: VersionRecord) -> Base | None:
    return next((each.base for each in gateway.served.values() if each.base.fingerprint == version.base), None)


def _base_files(gateway: Gateway, version: VersionRecord) -> dict[str, Any] | None:
    base = _served_base(gateway, version)
    if base is None:
        return None
    tokenizer = [file for file in TOKENIZER_FILES if (base.folder / file).is_file()]
    return {"name": base.name, "source": base.source, "tokenizer": tokenizer}


def _iter_bytes(content: BinaryIO) -> Iterator[bytes]:
    with content:
        while chunk := content.read(_CHUNK_BYTES):
            yield chunk


def adapter_object(record: AdapterRecord) -> dict[str, Any]:
    """An adapter on the wire."""
    return record.model_dump() | {"id": record.name, "object": "adapter"}


def _dump(records: Sequence[FrozenModel]) -> list[dict[str, Any]]:
    return [record.model_dump(mode="json") for record in records]
