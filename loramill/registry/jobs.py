"""Fine-tune jobs: a queue with leases.

A worker leases a job for some seconds and extends the lease with heartbeats. Each lease raises the job's
`attempt`, and whatever a worker changes it changes with its attempt: when it was silent for too long and another
worker has leased the job, everything it still tries raises LeaseLost. That is the fence that lets nothing be
published twice or by halves.

    queued -> running -> succeeded | failed | cancelled          running -> queued: a retry, or given back
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.errors import Conflict, InvalidRequest, JobCancelled, JobError, LeaseLost, LoramillError, NotFound
from loramill.registry import adapters, datasets, queue, tenants
from loramill.registry.pages import newest
from loramill.registry.tables import EventRow, JobRow, VersionRow
from loramill.types import JobEvent, JobRecord, JobSpec, JobStatus, VersionRecord

_FIELDS = tuple(name for name in JobRecord.model_fields if name != "metadata")


def submit(session: Session, spec: JobSpec, metadata: Mapping[str, str]) -> JobRecord:
    """Queues a job for the tenant that owns `spec.adapter`.

    Raises:
        NotFound: the tenant, a dataset of its own, or the version to start from doesn't exist.
    """
    tenant = spec.adapter_name.tenant
    tenants.get(session, tenant)
    for dataset in filter(None, (spec.train, spec.valid)):
        datasets.get(session, dataset, tenant)
    if spec.start_from is not None:
        _check_start(session, tenant, spec.start_from)
    row = JobRow(
        id=f"ftjob-{secrets.token_hex(12)}",
        tenant=tenant,
        spec=spec.model_dump(mode="json"),
        status=JobStatus.QUEUED,
        labels=dict(metadata),
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    _tell(session, row, "Queued.")
    return _record(row)


def get(session: Session, job_id: str, tenant: str | None = None) -> JobRecord:
    """The job of this id, if `tenant` (None: an admin) may see it.

    Raises:
        NotFound: there is none, or it is another tenant's; the message doesn't tell which.
    """
    row = session.get(JobRow, job_id)
    if row is None or tenant not in (None, row.tenant):
        raise NotFound(f"There is no fine-tuning job '{job_id}'.", param="fine_tuning_job_id")
    return _record(row)


def list_of(session: Session, *, tenant: str | None, after: str | None = None, limit: int = 20) -> list[JobRecord]:
    """A page of a tenant's jobs, or of all (None), newest first.

    Raises:
        NotFound: `after` is no id that the tenant has.
    """
    return [_record(row) for row in newest(session, JobRow, tenant, after, limit)]


def lease(session: Session, owner: str, *, now: float, seconds: float, max_attempts: int) -> JobRecord | None:
    """Gives `owner` a job for so many seconds: the oldest that waits, of the tenant with the fewest running jobs.

    A running job whose lease has run out waits as well; after `max_attempts` leases it has failed instead.
    None when nothing waits.
    """
    for lost in queue.lost_for_good(session, now, max_attempts):
        _settle(session, lost)
    row = queue.next_job(session, now)
    if row is None:
        return None
    row.status, row.owner, row.lease_until, row.max_attempts = JobStatus.RUNNING, owner, now + seconds, max_attempts
    row.attempt += 1
    row.started_at = row.started_at or now
    _tell(session, row, f"Attempt {row.attempt} started by {owner}.")
    return _record(row)


def count_open(session: Session) -> int:
    """How many jobs are queued or running: what a pool has work for."""
    return queue.count_open(session)


def heartbeat(
    session: Session, job_id: str, attempt: int, *, now: float, seconds: float, step: int, trained_tokens: int
) -> None:
    """Extends the lease to `now + seconds` and records the progress.

    Raises:
        LeaseLost: another worker has the job, or it has ended; stop at once.
        JobCancelled: its owner wants it to stop; stop and call `fail` with this error.
    """
    row = _held(session, job_id, attempt)
    _check_wanted(row)
    row.lease_until = now + seconds
    row.step, row.trained_tokens = step, trained_tokens
    session.flush()


def publish(session: Session, job_id: str, attempt: int, version: VersionRecord) -> JobRecord:
    """Ends the job with its version, whose artifact is stored already; the same call again changes nothing.

    An adapter's first version becomes champion, a later one challenger.

    Raises:
        LeaseLost: another worker has the job, or it has ended otherwise.
        JobCancelled: its owner wants it to stop; call `fail` with this error.
        InvalidRequest: the version isn't this job's.
    """
    row = _locked(session, job_id)
    if (row.status, row.attempt, row.version) == (JobStatus.SUCCEEDED, attempt, version.id):
        return _record(row)
    _check_held(row, attempt)
    _check_wanted(row)
    spec = JobSpec.model_validate(row.spec)
    if (version.adapter, version.job, version.base) != (spec.adapter, row.id, spec.base):
        raise InvalidRequest(
            f"Version {version.id} names another adapter, job or base than {row.id}; publish that one."
        )
    adapters.ensure(session, spec.adapter_name)
    alias = adapters.add_version(session, version)
    row.version, row.step = version.id, spec.steps
    _finish(session, row, JobStatus.SUCCEEDED)
    as_what = f"as {alias}" if alias else "again; it is the champion already"
    _tell(session, row, f"Published {spec.adapter_name.at(version.id)} {as_what}.")
    return _record(row)


def fail(session: Session, job_id: str, attempt: int, error: LoramillError, *, retry: bool) -> JobRecord:
    """Ends an attempt: the job is queued again if `retry` and attempts are left, else it has failed.

    A job that its owner cancelled is cancelled, whatever the error.

    Raises:
        LeaseLost: another worker has the job, or it has ended.
    """
    row = _held(session, job_id, attempt)
    if row.asked == "cancel" or isinstance(error, JobCancelled):
        _cancel(session, row)
    elif retry and row.attempt - row.returned < (row.max_attempts or 0):
        _requeue(row)
        _tell(session, row, f"Attempt {attempt} failed and will be tried again: {error.message}", level="warn")
    else:
        _fail(session, row, error)
    return _record(row)


def release(session: Session, job_id: str, attempt: int) -> JobRecord:
    """Gives a job back that goes on elsewhere; this doesn't use up an attempt.

    Raises:
        LeaseLost: another worker has the job, or it has ended.
    """
    row = _held(session, job_id, attempt)
    if row.asked == "cancel":
        _cancel(session, row)
    else:
        _requeue(row)
        row.returned += 1
        _tell(session, row, f"Attempt {attempt} stopped at step {row.step}; the job goes on when a worker is free.")
    return _record(row)


def cancel(session: Session, job_id: str) -> JobRecord:
    """Cancels a job: at once if it doesn't run, else its worker stops at the next heartbeat.

    Raises:
        NotFound: there is none.
        Conflict: it has ended already.
    """
    row = _locked(session, job_id)
    if row.status.final:
        raise Conflict(f"Job {job_id} can't be cancelled: it is {row.status} already.")
    if row.status is not JobStatus.RUNNING:
        _cancel(session, row)
    elif row.asked != "cancel":
        row.asked = "cancel"
        _tell(session, row, "Asked to stop.")
    return _record(row)


def add_event(
    session: Session,
    job_id: str,
    level: Literal["info", "warn", "error"],
    kind: Literal["message", "metrics"],
    message: str,
    data: Mapping[str, Any],
) -> JobEvent:
    """Adds a line to a job's history; `data` is JSON with finite numbers.

    Raises:
        NotFound: there is no such job.
    """
    # Holding the job keeps its events' ids in the order in which readers get to see them.
    return _add_event(session, _locked(session, job_id), level, kind, message, data)


def events(session: Session, job_id: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
    """The events of a job whose id is greater than `after`, oldest first."""
    statement = select(EventRow).where(EventRow.job == job_id, EventRow.id > after).order_by(EventRow.id).limit(limit)
    return [JobEvent.model_validate(row) for row in session.scalars(statement)]


def _check_start(session: Session, tenant: str, version_id: str) -> None:
    mine = select(VersionRow.id).where(
        VersionRow.id == version_id, VersionRow.adapter.startswith(f"{tenant}/", autoescape=True)
    )
    if session.scalar(mine) is None:
        raise NotFound(f"There is no version '{version_id}' to start from.", param="start_from")


def _settle(session: Session, row: JobRow) -> None:
    if row.asked == "cancel":
        _cancel(session, row)
        return
    message = (
        f"Job {row.id} was started {row.attempt} times and its worker disappeared each time, at last {row.owner} "
        f"after step {row.step}. It may need more memory than there is: see that worker's log."
    )
    _fail(session, row, JobError(message))


def _locked(session: Session, job_id: str) -> JobRow:
    row = session.get(JobRow, job_id, with_for_update=True)
    if row is None:
        raise NotFound(f"There is no fine-tuning job '{job_id}'.", param="fine_tuning_job_id")
    return row


def _held(session: Session, job_id: str, attempt: int) -> JobRow:
    row = _locked(session, job_id)
    _check_held(row, attempt)
    return row


def _check_held(row: JobRow, attempt: int) -> None:
    if row.status is not JobStatus.RUNNING or row.attempt != attempt:
        raise LeaseLost(
            f"Attempt {attempt} of job {row.id} no longer holds it: the job is {row.status} at attempt {row.attempt}. "
            "This worker may change nothing and has to stop."
        )


def _check_wanted(row: JobRow) -> None:
    if row.asked == "cancel":
        raise JobCancelled(f"Job {row.id} was cancelled by its owner.")


def _requeue(row: JobRow) -> None:
    row.status, row.owner, row.lease_until = JobStatus.QUEUED, None, None


def _finish(session: Session, row: JobRow, status: JobStatus) -> None:
    row.status, row.owner, row.lease_until, row.finished_at = status, None, None, time.time()
    session.flush()


def _cancel(session: Session, row: JobRow) -> None:
    row.asked = "cancel"
    _finish(session, row, JobStatus.CANCELLED)
    _tell(session, row, "Cancelled.")


def _fail(session: Session, row: JobRow, error: LoramillError) -> None:
    row.error_code, row.error_message = error.code, error.message
    _finish(session, row, JobStatus.FAILED)
    _tell(session, row, error.message, level="error")


def _tell(session: Session, row: JobRow, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
    _add_event(session, row, level, "message", message, {})


def _add_event(session: Session, job: JobRow, level: str, kind: str, message: str, data: Mapping[str, Any]) -> JobEvent:
    row = EventRow(job=job.id, created_at=time.time(), level=level, kind=kind, message=message, data=dict(data))
    session.add(row)
    session.flush()
    return JobEvent.model_validate(row)


def _record(row: JobRow) -> JobRecord:
    # The column is called metadata, the attribute can't be: SQLAlchemy's classes have one already.
    return JobRecord.model_validate({**{name: getattr(row, name) for name in _FIELDS}, "metadata": row.labels})
