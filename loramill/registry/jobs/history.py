"""A job's history as it is read: its newest lines page by page, or its numbers alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.registry.database.tables import EventRow
from loramill.types import JobEvent


def newest_events(session: Session, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
    """At most `limit` events of a job, newest first; only those whose id is below `before`, if that is given."""
    statement = select(EventRow).where(EventRow.job == job_id).order_by(EventRow.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(EventRow.id < before)
    return [JobEvent.model_validate(row) for row in session.scalars(statement)]


def metrics(session: Session, job_id: str) -> list[dict[str, Any]]:
    """The numbers of a job's metrics events, a dict for each step, in order.

    A step that another attempt did again is there once, as it was done at last.
    """
    statement = select(EventRow.data).where(EventRow.job == job_id, EventRow.kind == "metrics").order_by(EventRow.id)
    steps: dict[int, dict[str, Any]] = {}
    for data in session.scalars(statement):
        steps.setdefault(data["step"], {}).update(data)
    return [steps[step] for step in sorted(steps)]
