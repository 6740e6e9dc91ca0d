"""/v1/adapters/…/files and /import: downloads of versions, and uploads of adapters that were trained elsewhere."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Form
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from loramill.client.adapter_folder import TOKENIZER_FILES
from loramill.errors import AdapterInvalid, InvalidRequest, NotFound
from loramill.models.catalog import Base, base_modules
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.registry import adapters, jobs, tenants
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.responses import ERRORS, returns, returns_file
from loramill.serve.api.routes.adapters import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import (
    AdapterFiles,
    ImportedAdapter,
    ImportForm,
    VersionFilesParam,
    VersionFilesQuery,
)
from loramill.serve.api.schemas.common import AdapterPath, FileNamePath, TenantPath
from loramill.types import VersionRecord

router = APIRouter(tags=["adapters"], responses=ERRORS)

#: Maximum size of adapter_config.json in bytes. PEFT's own have a few thousand.
_MAX_CONFIG_BYTES = 1 << 20

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


@router.post(ADAPTER_PATH + "/import", summary="Import an adapter", responses=returns(ImportedAdapter))
def import_adapter(
    tenant: TenantPath,
    adapter: AdapterPath,
    form: Annotated[ImportForm, Form(media_type="multipart/form-data")],
    gateway: GatewayDep,
    caller: CallerDep,
) -> dict[str, Any]:
    """Stores a PEFT adapter for the served base as a version, which becomes the champion if it is the first.

    It is read like the engine reads it, so that an adapter that cannot be served is rejected, and is stored in a
    normal form.
    """
    name = authorized_name(caller, tenant, adapter)
    config, weights = form.config.file.read(_MAX_CONFIG_BYTES + 1), form.weights.file.read()
    if len(config) > _MAX_CONFIG_BYTES:
        raise InvalidRequest(f"adapter_config.json has more than {_MAX_CONFIG_BYTES} bytes.", param="config")
    with gateway.registry.reading() as session:
        tenants.check_storage_quota(session, tenant, len(weights))
    files = _normal_form(gateway.base, adapter, config, weights)
    origin = {"adapter": str(name), "base": gateway.base.fingerprint, "imported": hashlib.sha256(weights).hexdigest()}
    stored = gateway.registry.artifacts.put({**files, "loramill.json": json.dumps(origin, indent=1).encode()})
    record = VersionRecord(
        id=stored,
        adapter=str(name),
        job=None,
        base=gateway.base.fingerprint,
        bytes=gateway.registry.artifacts.size(stored),
        created_at=time.time(),
    )
    with gateway.registry.writing() as session:
        tenants.check_storage_quota(session, tenant, record.bytes, lock=True)
        adapters.get_or_create(session, name)
        adapters.add_version(session, record)
        if form.promote:
            adapters.promote(session, name, stored, f"imported and promoted with {caller.key_id}")
        record_change(session, caller, "adapter.import", str(name), tenant, version=stored, promote=form.promote)
        found = adapters.get(session, name)
    return adapter_object(found) | {"version": stored}


def _find_artifact(session: Session, name: AdapterName, query: VersionFilesQuery) -> tuple[VersionRecord, str]:
    """Returns the version and the artifact of a query.

    Raises:
        NotFound: there is no such adapter or version, or the version has no whole weights.
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


def _normal_form(base: Base, name: str, config: bytes, weights: bytes) -> dict[str, bytes]:
    """Returns the adapter's files in the normal form.

    Raises:
        InvalidRequest: the adapter is broken, incomplete, for another base, or of a kind that is not supported.
    """
    # Imported here, so that only gateways that import adapters load torch.
    from loramill.kernels.peft_folder import CONFIG_FILE, WEIGHTS_FILE, normalized_files, read_modules

    modules = _cached_modules(base)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / name  # error messages name it
        folder.mkdir()
        (folder / CONFIG_FILE).write_bytes(config)
        (folder / WEIGHTS_FILE).write_bytes(weights)
        try:
            found = read_modules(folder, modules)
        except AdapterInvalid as error:
            raise InvalidRequest(error.message, param="weights") from error
    if not found:
        raise InvalidRequest(f"The adapter in {name} changes nothing: all its ranks are pruned.", param="weights")
    return normalized_files(found, modules, base.name)


@lru_cache(maxsize=4)
def _cached_modules(base: Base) -> Any:
    return base_modules(base)
