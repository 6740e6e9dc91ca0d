"""/v1/adapters: pinning a champion, and warming a version up before it is asked."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from loramill.names import AdapterName
from loramill.registry import adapters
from loramill.serve.api.dependencies import Gateway, Here, Who
from loramill.serve.api.generation.admission import admit
from loramill.serve.api.generation.model_lookup import find_model
from loramill.serve.api.generation.streaming import collect
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.adapters import PATH, adapter_object, allowed
from loramill.serve.api.routes.audit import note
from loramill.serve.api.routes.references import named_by
from loramill.serve.api.schemas.common import Body
from loramill.serve.protocol import TextRequest
from loramill.types import Alias

router = APIRouter(tags=["adapters"])


class Selected(Body):
    """A version: an alias, or its id or the first 8 digits of it or more."""

    version: str = Alias.CHAMPION.value


@router.post(PATH + "/pin")
def pin(tenant: str, adapter: str, here: Here, who: Who, body: Selected | None = None) -> dict[str, Any]:
    """Makes a version the champion and keeps it: no night, promotion or rollback changes that until it is unpinned."""
    name, selected = allowed(who, tenant, adapter), body or Selected()
    with here.registry.writing() as session:
        version = _find(session, name, selected)
        pinned = adapters.pin(session, name, version, f"pinned with {who.key}")
        note(session, who, "adapter.pin", str(name), tenant, version=version)
        return adapter_object(pinned)


@router.post(PATH + "/unpin")
def unpin(tenant: str, adapter: str, here: Here, who: Who) -> dict[str, Any]:
    """Lets the champion change again."""
    name = allowed(who, tenant, adapter)
    with here.registry.writing() as session:
        adapters.get(session, name)
        unpinned = adapters.unpin(session, name)
        note(session, who, "adapter.unpin", str(name), tenant)
        return adapter_object(unpinned)


@router.post(PATH + "/warm")
async def warm(tenant: str, adapter: str, here: Here, who: Who, body: Selected | None = None) -> dict[str, Any]:
    """Has a version loaded where requests for it go, by asking it for one token, which counts like any other."""
    name, selected = allowed(who, tenant, adapter), body or Selected()
    version = await run_in_threadpool(_read, here, name, selected)
    target = await find_model(here, who, f"{name}@{version}")
    request = TextRequest(
        id=f"warm-{uuid.uuid4().hex}", tenant=target.tenant, version=target.version, prompt="Hello", max_tokens=1
    )
    began = time.perf_counter()
    chunks, _ = await admit(here, who, target, [request])
    await collect(chunks, 1)
    seconds = time.perf_counter() - began
    await run_in_threadpool(_note_warm, here, who, name, version)
    return {"object": "adapter.warm", "adapter": str(name), "version": version, "seconds": round(seconds, 3)}


def _find(session: Session, name: AdapterName, selected: Selected) -> str:
    adapters.get(session, name)
    with named_by("version"):
        return adapters.resolve(session, name, selected.version).id


def _read(here: Gateway, name: AdapterName, selected: Selected) -> str:
    with here.registry.reading() as session:
        return _find(session, name, selected)


def _note_warm(here: Gateway, who: Caller, name: AdapterName, version: str) -> None:
    with here.registry.writing() as session:
        note(session, who, "adapter.warm", str(name), name.tenant, version=version)
