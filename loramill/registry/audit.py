"""The audit: who changed what through the API, and when; written in the same transaction as the change."""

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
    """Adds an entry; the arguments are the fields of `AuditRecord`. `details` must not hold secrets or users' texts."""
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
    """Returns a page of the changes to what a tenant owns, or of all changes (None), newest first.

    Raises:
        NotFound: `after` is not the ID of one of these entries.
    """
    return [AuditRecord.model_validate(row) for row in newest_page(session, AuditRow, tenant, after, limit)]
