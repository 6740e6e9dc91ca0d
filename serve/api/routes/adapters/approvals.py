"""Challengers that passed the gate of a nightly run with `gate.approval: manual`, and wait for a person."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from loramill.registry import nightly_approvals
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import AdapterApproval, ApprovalRequest
from loramill.serve.api.schemas.common import AdapterPath, ListObject, TenantPath, list_object
from loramill.types import Approval

router = APIRouter(tags=["adapters"], responses=ERRORS)


@router.get(
    "/v1/adapters/approvals", summary="List what waits for approval", responses=returns(ListObject[AdapterApproval])
)
def list_approvals(gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the challengers of the caller's adapters that passed the gate of a nightly run and wait for approval."""
    with gateway.registry.reading() as session:
        return list_object(nightly_approvals.list_waiting(session, tenant=caller.tenant), _approval_object)


@router.post(ADAPTER_PATH + "/approval", summary="Approve or reject", responses=returns(AdapterApproval))
def decide_approval(
    tenant: TenantPath, adapter: AdapterPath, body: ApprovalRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lets the challenger of a nightly run take over, as nightly.yaml specified during the run, or drops it.

    It is a conflict if it was decided before, or if the champion is not the one that the challenger was compared with.
    """
    name = authorized_name(caller, tenant, adapter)
    decide = nightly_approvals.approve if body.decision == "approve" else nightly_approvals.reject
    with gateway.registry.writing() as session:
        decided = decide(session, body.run, name, by=caller.key_id, note=body.note)
        record_change(
            session, caller, f"adapter.{body.decision}", str(name), tenant, version=decided.version, run=body.run
        )
        return _approval_object(decided)


def _approval_object(approval: Approval) -> dict[str, Any]:
    return approval.model_dump(mode="json") | {"object": "adapter.approval"}
