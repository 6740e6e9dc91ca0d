"""/v1/adapters/…/import: uploads of adapters that were trained elsewhere."""

from __future__ import annotations

import hashlib
import json
import time
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Form

from loramill.errors import AdapterInvalid, InvalidRequest
from loramill.models.catalog import Base, base_modules
from loramill.registry import adapters, tenants
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import ImportedAdapter, ImportForm
from loramill.serve.api.schemas.common import AdapterPath, TenantPath
from loramill.types import VersionRecord

router = APIRouter(tags=["adapters"], responses=ERRORS)
#: Maximum size of adapter_config.json in bytes. PEFT's own have a few thousand.
_MAX_CONFIG_BYTES = 1 << 20


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
