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
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.generation.admission import admit
from loramill.serve.api.generation.model_lookup import find_model
from loramill.serve.api.generation.streaming import collect
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.adapters import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import RequestBody
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.submission.references import named_by
from loramill.types import Alias

router = APIRouter(tags=["adapters"])


class VersionSelector(RequestBody):
    """A version: an alias, or its id or the first 8 digits of it or more."""

    version: str = Alias.CHAMPION.value


@router.post(ADAPTER_PATH + "/pin")
def pin(
    tenant: str, adapter: str, gateway: GatewayDep, caller: CallerDep, body: VersionSelector | None = None
) -> dict[str, Any]:
    """Makes a version the champion and keeps it: no night, promotion or rollback changes that until it is unpinned."""
    name, selected = authorized_name(caller, tenant, adapter), body or VersionSelector()
    with gateway.registry.writing() as session:
        version = _resolve(session, name, selected)
        pinned = adapters.pin(session, name, version, f"pinned with {caller.key_id}")
        record_change(session, caller, "adapter.pin", str(name), tenant, version=version)
        return adapter_object(pinned)


@router.post(ADAPTER_PATH + "/unpin")
def unpin(tenant: str, adapter: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lets the champion change again."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        adapters.get(session, name)
        unpinned = adapters.unpin(session, name)
        record_change(session, caller, "adapter.unpin", str(name), tenant)
        return adapter_object(unpinned)


@router.post(ADAPTER_PATH + "/warm")
async def warm(
    tenant: str, adapter: str, gateway: GatewayDep, caller: CallerDep, body: VersionSelector | None = None
) -> dict[str, Any]:
    """Has a version loaded where requests for it go, by asking it for one token, which counts like any other."""
    name, selected = authorized_name(caller, tenant, adapter), body or VersionSelector()
    version = await run_in_threadpool(_resolve_in_session, gateway, name, selected)
    target = await find_model(gateway, caller, f"{name}@{version}")
    request = TextRequest(
        id=f"warm-{uuid.uuid4().hex}",
        tenant=target.tenant,
        version=target.version,
        prompt="Hello",
        sampling_params=SamplingParams(max_tokens=1),
    )
    began = time.perf_counter()
    chunks, _ = await admit(gateway, caller, target, [request])
    await collect(chunks, 1)
    seconds = time.perf_counter() - began
    await run_in_threadpool(_record_warm_up, gateway, caller, name, version)
    return {"object": "adapter.warm", "adapter": str(name), "version": version, "seconds": round(seconds, 3)}


def _resolve(session: Session, name: AdapterName, selected: VersionSelector) -> str:
    adapters.get(session, name)
    with named_by("version"):
        return adapters.resolve(session, name, selected.version).id


def _resolve_in_session(gateway: Gateway, name: AdapterName, selected: VersionSelector) -> str:
    with gateway.registry.reading() as session:
        return _resolve(session, name, selected)


def _record_warm_up(gateway: Gateway, caller: Caller, name: AdapterName, version: str) -> None:
    with gateway.registry.writing() as session:
        record_change(session, caller, "adapter.warm", str(name), name.tenant, version=version)
