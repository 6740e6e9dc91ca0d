"""/v1/adapters: adapters, and the aliases of their versions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from loramill.names import AdapterName
from loramill.registry import adapters, evaluations
from loramill.registry.rollouts import records as rollouts
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.generation.admission import admitted
from loramill.serve.api.generation.model_lookup import find_model
from loramill.serve.api.generation.streaming import collect
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.canary import rollout_object
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import Adapter, AdapterHistory, AdapterWarm, PromotionRequest, VersionSelector
from loramill.serve.api.schemas.common import AdapterPath, ListObject, TenantPath, list_object
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.submission.references import named_by
from loramill.types import FrozenModel

router = APIRouter(tags=["adapters"], responses=ERRORS)


@router.get("/v1/adapters", summary="List adapters", responses=returns(ListObject[Adapter]))
def list_adapters(gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the caller's adapters."""
    with gateway.registry.reading() as session:
        return list_object(adapters.list_adapters(session, caller.tenant), adapter_object)


@router.get(ADAPTER_PATH, summary="Retrieve an adapter", responses=returns(AdapterHistory))
def retrieve_adapter(
    tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Returns an adapter with its versions, the history of its aliases, its evaluations and its rollouts."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        return adapter_object(adapters.get(session, name)) | {
            "versions": _dump(adapters.list_versions(session, name)),
            "history": _dump(adapters.alias_history(session, name)),
            "evaluations": _dump(evaluations.list_evaluations(session, name)),
            "rollouts": [rollout_object(session, each) for each in rollouts.list_rollouts(session, name=name)],
        }


@router.post(ADAPTER_PATH + "/promote", summary="Promote a version", responses=returns(Adapter))
def promote(
    tenant: TenantPath, adapter: AdapterPath, body: PromotionRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Makes a version the champion. It answers from the next request on."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        version = _resolve(session, name, body.version)
        promoted = adapters.promote(session, name, version, f"promoted with {caller.key_id}")
        record_change(session, caller, "adapter.promote", str(name), tenant, version=version)
        return adapter_object(promoted)


@router.post(ADAPTER_PATH + "/rollback", summary="Roll back", responses=returns(Adapter))
def rollback(tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Makes the previous champion the champion again."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        rolled_back = adapters.rollback(session, name, f"rolled back with {caller.key_id}")
        record_change(session, caller, "adapter.rollback", str(name), tenant, version=rolled_back.champion)
        return adapter_object(rolled_back)


@router.post(ADAPTER_PATH + "/pin", summary="Pin a version", responses=returns(Adapter))
def pin(
    tenant: TenantPath,
    adapter: AdapterPath,
    gateway: GatewayDep,
    caller: CallerDep,
    body: VersionSelector | None = None,
) -> dict[str, Any]:
    """Makes a version the champion until it is unpinned: nightly runs, promotions and rollbacks do not change it."""
    name, selected = authorized_name(caller, tenant, adapter), body or VersionSelector()
    with gateway.registry.writing() as session:
        version = _resolve(session, name, selected.version)
        pinned = adapters.pin(session, name, version, f"pinned with {caller.key_id}")
        record_change(session, caller, "adapter.pin", str(name), tenant, version=version)
        return adapter_object(pinned)


@router.post(ADAPTER_PATH + "/unpin", summary="Unpin", responses=returns(Adapter))
def unpin(tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Allows the champion to change again."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        adapters.get(session, name)
        unpinned = adapters.unpin(session, name)
        record_change(session, caller, "adapter.unpin", str(name), tenant)
        return adapter_object(unpinned)


@router.post(ADAPTER_PATH + "/warm", summary="Load a version", responses=returns(AdapterWarm))
async def warm(
    tenant: TenantPath,
    adapter: AdapterPath,
    gateway: GatewayDep,
    caller: CallerDep,
    body: VersionSelector | None = None,
) -> dict[str, Any]:
    """Loads a version where its requests are routed, by generating one token, which counts as usage."""
    name, selected = authorized_name(caller, tenant, adapter), body or VersionSelector()
    version = await run_in_threadpool(_resolve_in_session, gateway, name, selected.version)
    target = await find_model(gateway, caller, f"{name}@{version}")
    request = TextRequest(
        id=f"warm-{uuid.uuid4().hex}",
        tenant=target.tenant,
        version=target.version,
        prompt="Hello",
        sampling_params=SamplingParams(max_tokens=1),
    )
    began = time.perf_counter()
    async with admitted(gateway, caller, target, [request]) as admission:
        await collect(admission.chunks, 1)
    seconds = time.perf_counter() - began
    await run_in_threadpool(_record_warm_up, gateway, caller, name, version)
    return {"object": "adapter.warm", "adapter": str(name), "version": version, "seconds": round(seconds, 3)}


def _resolve(session: Session, name: AdapterName, selector: str) -> str:
    adapters.get(session, name)
    with named_by("version"):
        return adapters.resolve(session, name, selector).id


def _resolve_in_session(gateway: Gateway, name: AdapterName, selector: str) -> str:
    with gateway.registry.reading() as session:
        return _resolve(session, name, selector)


def _record_warm_up(gateway: Gateway, caller: Caller, name: AdapterName, version: str) -> None:
    with gateway.registry.writing() as session:
        record_change(session, caller, "adapter.warm", str(name), name.tenant, version=version)


def _dump(records: Sequence[FrozenModel]) -> list[dict[str, Any]]:
    return [record.model_dump(mode="json") for record in records]
