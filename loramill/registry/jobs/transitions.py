"""How a job's row changes from one state to another; jobs.py and leases.py say when.

queued -> running -> succeeded | failed | cancelled
queued | running -> paused -> queued          running -> queued: a retry, a preemption, a worker that vanished
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy.orm import Session

from loramill.errors import LoramillError, NotFound, OutOfMemory
from loramill.registry.database.tables import EventRow, JobRow, TableBase
from loramill.registry.jobs import fair_share
from loramill.types import JobEvent, JobRecord, JobSpec, JobStatus

_EVENTS = TableBase.metadata.tables[EventRow.__tablename__]
_FIELDS = tuple(name for name in JobRecord.model_fields if name != "metadata")


def lock_job(session: Session, job_id: str) -> JobRow:
    """The job's row, held to the transaction's end.

    Raises:
        NotFound: there is none.
    """
    row = session.get(JobRow, job_id, with_for_update=True)
    if row is None:
        raise NotFound(f"There is no fine-tuning job '{job_id}'.", param="fine_tuning_job_id")
    return row


def to_record(row: JobRow) -> JobRecord:
    """The row as a value."""
    # The column is called metadata, the attribute can't be: SQLAlchemy's classes have one already.
    return JobRecord.model_validate({**{name: getattr(row, name) for name in _FIELDS}, "metadata": row.labels})


def start(session: Session, row: JobRow, owner: str, now: float, seconds: float, max_attempts: int) -> None:
    """Gives a queued job to a worker."""
    fair_share.charge(session, row)
    row.status, row.owner, row.lease_until, row.max_attempts = JobStatus.RUNNING, owner, now + seconds, max_attempts
    row.attempt += 1
    row.started_at = row.started_at or now
    row.pending_action = row.not_before = row.tokens_per_second = None
    tell(session, row, f"Attempt {row.attempt} started by {owner}.")


def stop(session: Session, row: JobRow, status: JobStatus) -> None:
    """Takes the job from whoever runs it; it ends, waits or is paused, as `status` says."""
    if row.status is JobStatus.RUNNING:
        fair_share.refund(session, row)
    row.status, row.owner, row.lease_until, row.tokens_per_second = status, None, None, None
    row.finished_at = time.time() if status.final else None
    session.flush()


def cancel(session: Session, row: JobRow) -> None:
    """Ends the job because its owner wants it."""
    row.pending_action = "cancel"
    stop(session, row, JobStatus.CANCELLED)
    tell(session, row, "Cancelled.")


def pause(session: Session, row: JobRow) -> None:
    """Lets the job wait for its owner."""
    row.pending_action = None
    stop(session, row, JobStatus.PAUSED)
    tell(session, row, f"Paused at step {row.step}.")


def fail(session: Session, row: JobRow, error: LoramillError) -> None:
    """Ends the job with an error."""
    row.error_code, row.error_message = error.code, error.message
    stop(session, row, JobStatus.FAILED)
    tell(session, row, error.message, level="error")


def retry_with_smaller_microbatch(session: Session, row: JobRow, error: OutOfMemory) -> None:
    """Lets a job that found no memory try once more with half as many tokens a forward pass, then fails it."""
    spec = JobSpec.model_validate(row.spec)
    if row.micro_tokens is not None or spec.micro_tokens == 1:
        fail(session, row, error)
        return
    row.micro_tokens, row.lost_step = spec.micro_tokens // 2, None
    stop(session, row, JobStatus.QUEUED)
    tell(
        session,
        row,
        f"Attempt {row.attempt} ran out of memory; the next one computes {row.micro_tokens} tokens at a time instead "
        f"of {spec.micro_tokens}, to the same result: {error.message}",
        level="warn",
    )


def tell(session: Session, row: JobRow, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
    """Adds a line to the job's history."""
    # Not through the session's unit of work: that takes several times as long, and a submit is little else.
    session.execute(_EVENTS.insert(), _event(row, level, "message", message, {}))


def add_event(session: Session, job: JobRow, level: str, kind: str, message: str, data: Mapping[str, Any]) -> JobEvent:
    """Adds a line with data."""
    row = EventRow(**_event(job, level, kind, message, data))
    session.add(row)
    session.flush()
    return JobEvent.model_validate(row)


def _event(job: JobRow, level: str, kind: str, message: str, data: Mapping[str, Any]) -> dict[str, Any]:
    values = {"level": level, "kind": kind, "message": message, "data": dict(data)}
    return {"job": job.id, "created_at": time.time()} | values
