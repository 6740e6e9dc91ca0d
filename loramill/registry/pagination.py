"""Cursor pages as in OpenAI's API: newest first; `after` is the last ID of the previous page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.orm import Session

from loramill.errors import NotFound
from loramill.registry.database.tables import AuditRow, DatasetRow, JobRow

Listed = TypeVar("Listed", AuditRow, DatasetRow, JobRow)


def newest_page(
    session: Session,
    table: type[Listed],
    tenant: str | None,
    after: str | None,
    limit: int,
    filters: Sequence[ColumnElement[bool]] = (),
) -> list[Listed]:
    """Returns at most `limit` rows, newest first.

    A caller that has to know whether there are more rows passes a limit that is larger by one.

    Args:
        tenant: only rows of this tenant; None: of all tenants.
        filters: conditions that all have to be true.

    Raises:
        NotFound: `after` is not an ID of a row of the tenant.
    """
    statement = select(table).where(*filters).order_by(table.created_at.desc(), table.id.desc()).limit(limit)
    if tenant is not None:
        statement = statement.where(table.tenant == tenant)
    if after is not None:
        last = session.get(table, after)
        if last is None or tenant not in (None, last.tenant):
            raise NotFound(f"There is no '{after}' to list after.", param="after")
        statement = statement.where(tuple_(table.created_at, table.id) < (last.created_at, last.id))
    return list(session.scalars(statement))
