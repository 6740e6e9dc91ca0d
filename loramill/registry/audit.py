"""The audit: who changed what through the API, and when. Written in the change's own transaction; nothing alters it."""

from __future__ import annotations

import secrets
import time
from typing import Any

from sqlalchemy.orm import Session

from loramill.registry.database.tables import AuditRow
from loramill.registry.pagination import newest_page
from loramill.types import AuditRecord


def record(
    session: Session,
    *,
    tenant: str | None,
    actor: str | None,
    key: str,
    action: str,
    subject: str,
    request: str,
    **details: Any,
) -> AuditRecord:
    """Writes a change down; what the arguments are, `AuditRecord` says. `details` hold no secret and nobody's text."""
    row = AuditRow(
        id=f"audit-{secrets.token_hex(12)}",
        created_at=time.time(),
        tenant=tenant,
        actor=actor,
        key=key,
        action=action,
        subject=subject,
        details=details,
        request=request,
    )
    session.add(row)
    session.flush()
    return AuditRecord.model_validate(row)


def list_changes(session: Session, tenant: str | None, after: str | None = None, limit: int = 100) -> list[AuditRecord]:
    """A page of the changes to a tenant's things, or of all (None), newest first.

    Raises:
        NotFound: `after` is no id of these.
    """
    return [AuditRecord.model_validate(row) for row in newest_page(session, AuditRow, tenant, after, limit)]
