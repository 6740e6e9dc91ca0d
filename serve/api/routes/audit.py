"""GET /v1/audit, and how every endpoint that changes something writes it down there."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from loramill.registry import audit, tenants
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.schemas.common import ListQuery, page_object
from loramill.types import AuditRecord

router = APIRouter(tags=["tenants"])


class AuditQuery(ListQuery):
    """The query of the list of changes."""

    tenant: str | None = None


@router.get("/v1/audit")
def list_changes(query: Annotated[AuditQuery, Query()], gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Changes to the caller's tenant's things, newest first; an admin sees all, or a tenant's."""
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
    """Writes down, in the transaction of the change, that the caller did `action` to a thing of `tenant`'s.

    `details` are names and numbers: no secret, and nothing of a prompt. Called after the change, which takes its locks
    first: a note takes one on the tenant.
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
