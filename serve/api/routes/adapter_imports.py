"""/v1/adapters/{tenant}/{adapter}/import: stores an adapter that was trained elsewhere as a version."""

from __future__ import annotations

import hashlib
import json
import time
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from loramill.errors import AdapterInvalid, InvalidRequest
from loramill.models.catalog import Base, modules_of
from loramill.registry import adapters, tenants
from loramill.serve.api.dependencies import Here, Who
from loramill.serve.api.routes.adapters import PATH, adapter_object, allowed
from loramill.serve.api.routes.audit import note
from loramill.types import VersionRecord

router = APIRouter(tags=["adapters"])

#: Bytes of adapter_config.json at most; PEFT's own have a few thousand.
_CONFIG_BYTES = 1 << 20


class Import(BaseModel):
    """The form of an import: the two files that PEFT's `save_pretrained` writes."""

    model_config = ConfigDict(extra="forbid")
    config: UploadFile = Field(description="adapter_config.json")
    weights: UploadFile = Field(description="adapter_model.safetensors")
    promote: bool = Field(default=False, description="make it the champion")


@router.post(PATH + "/import")
def import_adapter(
    tenant: str,
    adapter: str,
    form: Annotated[Import, Form(media_type="multipart/form-data")],
    here: Here,
    who: Who,
) -> dict[str, Any]:
    """Stores a PEFT adapter for the served base as a version: the champion, if it is the adapter's first.

    It is read as the engine reads it, so that an adapter that can't be served is refused, and stored in a normal form.
    """
    name = allowed(who, tenant, adapter)
    config, weights = form.config.file.read(_CONFIG_BYTES + 1), form.weights.file.read()
    if len(config) > _CONFIG_BYTES:
        raise InvalidRequest(f"adapter_config.json has more than {_CONFIG_BYTES} bytes.", param="config")
    with here.registry.reading() as session:
        tenants.check_room(session, tenant, len(weights))
    files = _normal(here.base, adapter, config, weights)
    origin = {"adapter": str(name), "base": here.base.fingerprint, "imported": hashlib.sha256(weights).hexdigest()}
    stored = here.registry.artifacts.put({**files, "loramill.json": json.dumps(origin, indent=1).encode()})
    record = VersionRecord(
        id=stored,
        adapter=str(name),
        job=None,
        base=here.base.fingerprint,
        bytes=here.registry.artifacts.size(stored),
        created_at=time.time(),
    )
    with here.registry.writing() as session:
        tenants.check_room(session, tenant, record.bytes, hold=True)
        adapters.ensure(session, name)
        adapters.add_version(session, record)
        if form.promote:
            adapters.promote(session, name, stored, f"imported and promoted with {who.key}")
        note(session, who, "adapter.import", str(name), tenant, version=stored, promote=form.promote)
        found = adapters.get(session, name)
    return adapter_object(found) | {"version": stored}


def _normal(base: Base, name: str, config: bytes, weights: bytes) -> dict[str, bytes]:
    """The adapter's files in the normal form.

    Raises:
        InvalidRequest: it is broken, incomplete, of another base, or of a kind that isn't supported.
    """
    # Imported here, so that only gateways that import adapters load torch.
    from loramill.kernels.peft_folder import CONFIG_FILE, WEIGHTS_FILE, normal_files, read_modules

    modules = _modules_of(base)
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
    return normal_files(found, modules, base.name)


@lru_cache(maxsize=4)
def _modules_of(base: Base) -> Any:
    return modules_of(base)
