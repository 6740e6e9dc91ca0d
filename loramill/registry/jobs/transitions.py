"""The status changes of a job; `jobs.py` and `leases.py` decide when each happens.

queued -> running -> succeeded | failed | cancelled
queued | running -> paused -> queued
running -> queued             a retry, a preemption, an expired lease
failed | cancelled -> queued  a manual retry
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from typing import Any, Literal

from sqlalchemy import update
from sqlalchemy.orm import Session

from loramill.errors import Conflict, LoramillError, NotFound, OutOfMemory
from loramill.registry.database.tables import EventRow, JobRow, TableBase
from loramill.registry.jobs import fair_share
from loramill.types import JobRecord, JobSpec, JobStatus

#: The statuses that a job may change to, by its status.
ALLOWED: Mapping[JobStatus, Set[JobStatus]] = {
    JobStatus.VALIDATING: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(set(JobStatus) - {JobStatus.VALIDATING, JobStatus.RUNNING}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
}

_EVENTS = TableBase.metadata.tables[EventRow.__tablename__]
_FIELDS = tuple(name for name in JobRecord.model_fields if name != "metadata")


def lock_job(session: Session, job_id: str) -> JobRow:
    """Returns the job's row, locked until the transaction ends.

    Raises:
        NotFound: there is no such job.
    """
    row = session.get(JobRow, job_id, with_for_update=True)
    if row is None:
        raise NotFound(f"There is no fine-tuning job '{job_id}'.", param="fine_tuning_job_id")
    return row


def to_record(row: JobRow) -> JobRecord:
    """Converts a row to a value."""
    # The column is called metadata, but the attribute cannot be: SQLAlchemy's classes already have one.
    return JobRecord.model_validate(
        {**{name: getattr(row, name) for name in _FIELDS}, "metadata": row.labels, "sweep": row.sweep or ()}
    )


def start(session: Session, row: JobRow, owner: str, now: float, seconds: float, max_attempts: int) -> None:
    """Leases a queued job to a worker."""
    _set_status(row, JobStatus.RUNNING)
    fair_share.charge(session, row)
    row.owner, row.lease_until, row.max_attempts = owner, now + seconds, max_attempts
    row.attempt += 1
    row.started_at = row.started_at or now
    row.pending_action = row.not_before = row.tokens_per_second = None
    row.shared = _mark_shared(session, row)
    started = {"attempt": row.attempt, "owner": owner}
    add_event(session, row, f"Attempt {row.attempt} started by {owner}.", data=started)


def _mark_shared(session: Session, row: JobRow) -> bool:
    """Marks the other jobs of a job's session, if it has any, as sharing it; returns whether it has."""
    others = (JobRow.owner == row.owner, JobRow.status == JobStatus.RUNNING, JobRow.id != row.id)
    marked = session.scalars(update(JobRow).where(*others).values(shared=True).returning(JobRow.id))
    return bool(marked.all())


def stop(session: Session, row: JobRow, status: JobStatus) -> None:
    """Ends the job's lease, if it has one, and gives the job another status than running."""
    was_running = row.status is JobStatus.RUNNING
    _set_status(row, status)
    if was_running:
        fair_share.refund(session, row)
    row.owner = row.lease_until = row.tokens_per_second = None
    row.finished_at = time.time() if status.final else None
    session.flush()


def cancel(session: Session, row: JobRow) -> None:
    """Ends the job because its owner cancelled it."""
    row.pending_action = "cancel"
    stop(session, row, JobStatus.CANCELLED)
    add_event(session, row, "Cancelled.")


def pause(session: Session, row: JobRow) -> None:
    """Pauses the job until its owner resumes it."""
    row.pending_action = None
    stop(session, row, JobStatus.PAUSED)
    add_event(session, row, f"Paused at step {row.step}.")


def fail(session: Session, row: JobRow, error: LoramillError) -> None:
    """Ends the job with an error."""
    row.error_code, row.error_message = error.code, error.message
    stop(session, row, JobStatus.FAILED)
    add_event(session, row, error.message, level="error")


def retry_out_of_memory(session: Session, row: JobRow, error: OutOfMemory) -> None:
    """Queues a job that ran out of memory again, at most twice; then fails it.

    It is first retried with half as many tokens per forward pass and then, if other jobs shared its session, in a
    session for itself, since they may have used up the memory.
    """
    spec = JobSpec.model_validate(row.spec)
    if row.micro_tokens is None and spec.micro_tokens > 1:
        row.micro_tokens, row.lost_step = spec.micro_tokens // 2, None
        stop(session, row, JobStatus.QUEUED)
        message = (
            f"Attempt {row.attempt} ran out of memory; the next attempt computes {row.micro_tokens} tokens at a time "
            f"instead of {spec.micro_tokens}, with the same result: {error.message}"
        )
        add_event(session, row, message, level="warn")
    elif row.shared and not row.alone:
        retry_alone(session, row, f"Attempt {row.attempt} ran out of memory: {error.message}")
    else:
        fail(session, row, error)


def retry_alone(session: Session, row: JobRow, reason: str) -> None:
    """Queues a job whose session had several jobs for a session of its own, with all of its attempts again.

    Args:
        reason: a sentence for the job's history.
    """
    row.alone, row.returned, row.lost_step = True, row.attempt, None
    stop(session, row, JobStatus.QUEUED)
    message = (
        f"{reason} Several jobs shared the session, and any of them may be the cause: the next attempt has a session "
        "for itself."
    )
    add_event(session, row, message, level="warn")


def add_event(
    session: Session,
    row: JobRow,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    kind: Literal["message", "metrics"] = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Adds an event to the job's history."""
    values = {"level": level, "kind": kind, "message": message, "data": dict(data or {})}
    # Not through the session's unit of work, which takes several times as long; a submission does little else.
    session.execute(_EVENTS.insert(), {"job": row.id, "created_at": time.time()} | values)


def _set_status(row: JobRow, status: JobStatus) -> None:
    if status not in ALLOWED[row.status]:
        raise Conflict(f"Job {row.id} is {row.status} and cannot become {status}.")
    row.status = status
