"""Cursor pages as in OpenAI's API: newest first, `after` being the last id of the page before."""

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
    """At most `limit` rows of a tenant, or of all (None), for which all of `having` is true.

    Ask for one more to learn whether there are more.

    Raises:
        NotFound: `after` is no id that the tenant has.
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
