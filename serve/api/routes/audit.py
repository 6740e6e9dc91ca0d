"""GET /v1/audit, and how every endpoint that changes something writes it down there."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from loramill.registry import audit, tenants
from loramill.serve.api.dependencies import Here, Who
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.schemas.common import Paging, page_of
from loramill.types import AuditRecord

router = APIRouter(tags=["tenants"])


class AuditPaging(Paging):
    """The query of the list of changes."""

    tenant: str | None = None


@router.get("/v1/audit")
def list_changes(page: Annotated[AuditPaging, Query()], here: Here, who: Who) -> dict[str, Any]:
    """Changes to the caller's tenant's things, newest first; an admin sees all, or a tenant's."""
    tenant = who.tenant if page.tenant is None else page.tenant
    with here.registry.reading() as session:
        if page.tenant is not None:
            who.check_tenant(page.tenant)
            tenants.get(session, page.tenant)
        records = audit.list_of(session, tenant, page.after, page.limit + 1)
    return page_of(records, page.limit, _change)


def note(session: Session, who: Caller, action: str, subject: str, tenant: str | None, **details: Any) -> None:
    """Writes down, in the transaction of the change, that the caller did `action` to a thing of `tenant`'s.

    `details` are names and numbers: no secret, and nothing of a prompt. Called after the change, which takes its locks
    first: a note takes one on the tenant.
    """
    audit.note(
        session,
        tenant=tenant,
        actor=None if who.admin else who.tenant,
        key=who.key,
        action=action,
        subject=subject,
        request=who.request,
        **details,
    )


def _change(record: AuditRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "audit.change"}
