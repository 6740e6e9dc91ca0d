"""GET /v1/audit, and the function with which endpoints record their changes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from loramill.registry import audit, tenants
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.schemas.common import ListObject, page_object
from loramill.serve.api.schemas.tenants import AuditChange, AuditQuery
from loramill.types import AuditRecord

router = APIRouter(tags=["tenants"], responses=ERRORS)


@router.get("/v1/audit", summary="List the audit log", responses=returns(ListObject[AuditChange]))
def list_changes(query: Annotated[AuditQuery, Query()], gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists changes made through the API, newest first."""
    tenant = caller.tenant if query.tenant is None else query.tenant
    with gateway.registry.reading() as session:
        if query.tenant is not None:
            caller.check_tenant(query.tenant)
            tenants.get(session, query.tenant)
        records = audit.list_changes(session, tenant, query.after, query.limit + 1)
    return page_object(records, query.limit, _change_object)


def record_change(
    session: Session, caller: Caller, action: str, subject: str, tenant: str | None, **details: Any
) -> None:
    """Records, in the transaction of the change, that the caller did `action` to `subject`, which `tenant` owns.

    `details` are names and numbers: no secrets, and no text of prompts. It is called after the change, which takes its
    locks first, since this takes one on the tenant.
    """
    audit.record(
        session,
        tenant=tenant,
        actor=None if caller.admin else caller.tenant,
        key=caller.key_id,
        action=action,
        subject=subject,
        request=caller.request_id,
        **details,
    )


def _change_object(record: AuditRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "audit.change"}
