"""Cursor pages as in OpenAI's API: newest or oldest first; `after` is the last ID of the previous page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.orm import Session

from loramill.errors import NotFound
from loramill.registry.database.tables import AuditRow, CompletionRow, DatasetRow, FeedbackRow, JobRow

Listed = TypeVar("Listed", AuditRow, CompletionRow, DatasetRow, FeedbackRow, JobRow)


def newest_page(
    session: Session,
    table: type[Listed],
    tenant: str | None,
    after: str | None,
    limit: int,
    filters: Sequence[ColumnElement[bool]] = (),
    *,
    oldest_first: bool = False,
) -> list[Listed]:
    """Returns at most `limit` rows, newest first unless `oldest_first` is true.

    A caller that has to know whether there are more rows passes a limit that is larger by one.

    Args:
        tenant: only rows of this tenant; None: of all tenants.
        filters: conditions that all have to be true.

    Raises:
        NotFound: `after` is not an ID of a row of the tenant.
    """
    statement = select(table).where(*filters).limit(limit)
    columns = (table.created_at, table.id)
    statement = statement.order_by(*(each.asc() if oldest_first else each.desc() for each in columns))
    if tenant is not None:
        statement = statement.where(table.tenant == tenant)
    if after is not None:
        last = session.get(table, after)
        if last is None or tenant not in (None, last.tenant):
            raise NotFound(f"There is no '{after}' to list after.", param="after")
        row, position = tuple_(*columns), (last.created_at, last.id)
        statement = statement.where(row > position if oldest_first else row < position)
    return list(session.scalars(statement))
