"""Reading the history of a job: its newest events page by page, its metrics, or its attempts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.registry.database.tables import EventRow, JobRow
from loramill.registry.jobs.sweeps import leading
from loramill.types import JobAttempt, JobEvent, JobStatus


def newest_events(session: Session, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
    """Returns at most `limit` events of a job, newest first; with `before`, only those with a smaller ID."""
    statement = select(EventRow).where(EventRow.job == job_id).order_by(EventRow.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(EventRow.id < before)
    return [JobEvent.model_validate(row) for row in session.scalars(statement)]


def metrics(session: Session, job_id: str) -> list[dict[str, Any]]:
    """Returns the metrics of a job, one dict per step, in order of steps.

    A step that several attempts did appears once, with the metrics of the last attempt. Those of a sweep are of the
    candidate with the lowest validation loss so far.
    """
    statement = select(EventRow.data).where(EventRow.job == job_id, EventRow.kind == "metrics").order_by(EventRow.id)
    shown = leading(session.scalar(select(JobRow.sweep).where(JobRow.id == job_id)) or ())
    steps: dict[int, dict[str, Any]] = {}
    for data in session.scalars(statement):
        if data.get("candidate", shown) != shown:
            continue
        steps.setdefault(data["step"], {}).update(data)
    return [steps[step] for step in sorted(steps)]


def attempts(session: Session, job_id: str, *, now: float) -> list[JobAttempt]:
    """Returns the attempts of a job, oldest first; one that still runs ends at `now`.

    Attempts of jobs that started before their events named the worker are missing.
    """
    columns = (EventRow.created_at, EventRow.kind, EventRow.data)
    found: list[JobAttempt] = []
    for at, kind, data in session.execute(select(*columns).where(EventRow.job == job_id).order_by(EventRow.id)):
        if "owner" in data:
            found.append(JobAttempt(owner=data["owner"], started_at=at, ended_at=at))
        elif kind == "metrics" and found:
            found[-1] = found[-1].model_copy(update={"ended_at": at})
    row = session.get(JobRow, job_id)
    if found and row is not None and (row.finished_at is not None or row.status is JobStatus.RUNNING):
        end = now if row.finished_at is None else row.finished_at
        found[-1] = found[-1].model_copy(update={"ended_at": max(end, found[-1].started_at)})
    return found
