"""/v1/adapters/…/files: downloads of versions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from fastapi import APIRouter
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from loramill.client.adapter_folder import TOKENIZER_FILES
from loramill.errors import NotFound
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.registry import adapters, jobs
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.responses import ERRORS, returns, returns_file
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, authorized_name
from loramill.serve.api.schemas.adapters import AdapterFiles, VersionFilesParam, VersionFilesQuery
from loramill.serve.api.schemas.common import AdapterPath, FileNamePath, TenantPath
from loramill.types import VersionRecord

router = APIRouter(tags=["adapters"], responses=ERRORS)
#: Bytes per chunk of a download.
_CHUNK_BYTES = 1 << 20


@router.get(ADAPTER_PATH + "/files", summary="List a version's files", responses=returns(AdapterFiles))
def list_files(
    tenant: TenantPath, adapter: AdapterPath, query: VersionFilesParam, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lists a version's files with their sizes and hashes."""
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


@router.get(
    ADAPTER_PATH + "/files/{file}",
    summary="Download a version's file",
    responses=returns_file("application/octet-stream"),
    response_class=StreamingResponse,
)
def retrieve_file(
    tenant: TenantPath,
    adapter: AdapterPath,
    file: FileNamePath,
    query: VersionFilesParam,
    gateway: GatewayDep,
    caller: CallerDep,
) -> StreamingResponse:
    """Returns the bytes of one file of a version, or of a tokenizer file of its base."""
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


def _find_artifact(session: Session, name: AdapterName, query: VersionFilesQuery) -> tuple[VersionRecord, str]:
    """Returns the version and the artifact of a query.

    Raises:
        NotFound: the adapter or the version does not exist, or the version has no whole weights.
    """
    adapters.get(session, name)
    version = adapters.resolve(session, name, query.version)
    if not query.full:
        return version, version.id
    result = jobs.get(session, version.job).result if version.job else None
    if result is None:
        raise NotFound(
            f"{name.at(version.id)} was not made by full fine-tuning, so it has no whole weights: omit 'full', or "
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
