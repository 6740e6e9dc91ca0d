"""The canary of an adapter: the share of its requests that the challenger answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from loramill.registry import adapters
from loramill.registry.rollouts import moves, traffic
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import AdapterRollout, CanaryRequest
from loramill.serve.api.schemas.common import AdapterPath, TenantPath
from loramill.submission.references import named_by
from loramill.types import RolloutRecord

router = APIRouter(tags=["adapters"], responses=ERRORS)


@router.post(ADAPTER_PATH + "/canary", summary="Start or change a canary", responses=returns(AdapterRollout))
def start_canary(
    tenant: TenantPath, adapter: AdapterPath, body: CanaryRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lets the challenger answer a share of the requests for the adapter; those that name a version are not affected.

    Each user (`user`, or else the API key) gets answers of one version while the share does not shrink. If the
    challenger turns out to be much worse than the champion, the canary ends by itself.
    """
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        adapters.get(session, name)
        version = None
        if body.version is not None:
            with named_by("version"):
                version = adapters.resolve(session, name, body.version).id
        started = moves.start_canary(
            session,
            name,
            share=body.share,
            shadow=body.shadow,
            version=version,
            changes=body.changes(),
            promote_at_end=body.promote_after_seconds is not None,
            reason=f"canary started with {caller.key_id}",
        )
        details = {"version": started.version, "share": started.share, "kind": started.kind.value}
        record_change(session, caller, "adapter.canary", str(name), tenant, **details)
        return rollout_object(session, started)


@router.delete(ADAPTER_PATH + "/canary", summary="End a canary", responses=returns(AdapterRollout))
def end_canary(tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Ends the canary: the champion answers all requests again. The challenger stays the challenger."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        ended = moves.end_canary(session, name, f"ended with {caller.key_id}")
        record_change(session, caller, "adapter.canary_end", str(name), tenant, version=ended.version)
        return rollout_object(session, ended)


def rollout_object(session: Session, rollout: RolloutRecord) -> dict[str, Any]:
    """Returns a rollout object, with what has been measured."""
    return traffic.measured(session, rollout).model_dump(mode="json") | {"object": "adapter.rollout"}
