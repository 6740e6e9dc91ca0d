"""Fine-tune jobs: what their owners do with them. What a worker does with them is in leases.py."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.errors import Conflict, InvalidRequest, NotFound
from loramill.registry import datasets
from loramill.registry.database.tables import EventRow, JobRow, VersionRow
from loramill.registry.jobs import fair_share, transitions
from loramill.registry.pagination import newest_page
from loramill.types import Executor, JobEvent, JobRecord, JobSpec, JobStatus

#: Final states from which a job can be retried.
RETRYABLE_STATUSES = (JobStatus.FAILED, JobStatus.CANCELLED)


#: An id that was shortened.
_ID_PREFIX = re.compile(r"ftjob-[0-9a-f]{4,23}")


def submit(
    session: Session,
    spec: JobSpec,
    metadata: Mapping[str, str],
    *,
    priority: int = 0,
    executor: Executor = "session",
    cost: float = 0.0,
) -> JobRecord:
    """Queues a job for the tenant that owns `spec.adapter`.

    Args:
        priority: jobs of a higher one start first, and may preempt.
        executor: who is to run it.
        cost: tokens that it will train on, prompts included; 0: not known, and taken for the most that it can be.

    Raises:
        NotFound: the tenant, a dataset of its own, or the version to start from doesn't exist.
        QuotaExceeded: the tenant has as many jobs waiting as it may have.
    """
    tenant = spec.adapter_name.tenant
    fair_share.enter_queue(session, tenant)
    for dataset in filter(None, (spec.train, spec.valid)):
        datasets.get(session, dataset, tenant)
    if spec.start_from is not None:
        _check_start(session, tenant, spec.start_from)
    row = JobRow(
        id=f"ftjob-{secrets.token_hex(12)}",
        tenant=tenant,
        spec=spec.model_dump(mode="json"),
        base=spec.base,
        status=JobStatus.QUEUED,
        priority=priority,
        executor=executor,
        cost=cost or float(spec.steps * spec.batch_size * spec.max_length),
        labels=dict(metadata),
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    transitions.tell(session, row, "Queued.")
    return transitions.to_record(row)


def get(session: Session, job_id: str, tenant: str | None = None) -> JobRecord:
    """The job with this id, or with an id that begins with it (`ftjob-` and at least 4 digits), if `tenant` may see it.

    Args:
        tenant: None: an admin, who sees all.

    Raises:
        NotFound: there is none, or it is another tenant's; the message doesn't tell which.
        InvalidRequest: several ids begin with it.
    """
    row = session.get(JobRow, job_id) or _find_by_prefix(session, job_id, tenant)
    if row is None or tenant not in (None, row.tenant):
        raise NotFound(f"There is no fine-tuning job '{job_id}'.", param="fine_tuning_job_id")
    return transitions.to_record(row)


def _find_by_prefix(session: Session, prefix: str, tenant: str | None) -> JobRow | None:
    if not _ID_PREFIX.fullmatch(prefix):
        return None
    # A range of the primary key, which both databases look up in its index. "g" follows every hexadecimal digit.
    statement = select(JobRow).where(JobRow.id >= prefix, JobRow.id < prefix + "g").limit(2)
    if tenant is not None:
        statement = statement.where(JobRow.tenant == tenant)
    found = session.scalars(statement).all()
    if len(found) > 1:
        raise InvalidRequest(f"Several jobs' ids begin with '{prefix}'; give more digits.", param="fine_tuning_job_id")
    return found[0] if found else None


def list_jobs(
    session: Session,
    *,
    tenant: str | None,
    after: str | None = None,
    limit: int = 20,
    metadata: Mapping[str, str] | None = None,
) -> list[JobRecord]:
    """A page of a tenant's jobs, or of all (None), newest first; with `metadata`, of those that have all of it.

    Raises:
        NotFound: `after` is no id that the tenant has.
    """
    having = [JobRow.labels[key].as_string() == value for key, value in (metadata or {}).items()]
    return [transitions.to_record(row) for row in newest_page(session, JobRow, tenant, after, limit, having)]


def list_by_metadata(session: Session, key: str, values: Collection[str]) -> list[JobRecord]:
    """All jobs whose metadata has one of these values under `key`, newest first."""
    statement = select(JobRow).where(JobRow.labels[key].as_string().in_(values))
    return [transitions.to_record(row) for row in session.scalars(statement.order_by(JobRow.created_at.desc()))]


def cancel(session: Session, job_id: str) -> JobRecord:
    """Cancels a job: at once if it doesn't run, else its worker stops at the next heartbeat.

    Raises:
        NotFound: there is none.
        Conflict: it has ended already.
    """
    row = transitions.lock_job(session, job_id)
    if row.status.final:
        raise Conflict(f"Job {job_id} can't be cancelled: it is {row.status} already.")
    if row.status is not JobStatus.RUNNING:
        transitions.cancel(session, row)
    elif row.pending_action != "cancel":
        row.pending_action = "cancel"
        transitions.tell(session, row, "Asked to stop.")
    return transitions.to_record(row)


def pause(session: Session, job_id: str) -> JobRecord:
    """Lets a job wait until `resume`: at once if it doesn't run, else its worker writes a checkpoint and stops.

    Raises:
        NotFound: there is none.
        Conflict: it has ended, or is being cancelled.
    """
    row = transitions.lock_job(session, job_id)
    if row.status.final or row.pending_action == "cancel":
        raise Conflict(
            f"Job {job_id} can't be paused: it is {'being cancelled' if row.pending_action else row.status}."
        )
    if row.status is JobStatus.QUEUED:
        transitions.pause(session, row)
    elif row.status is JobStatus.RUNNING and row.pending_action != "pause":
        row.pending_action = "pause"
        transitions.tell(session, row, "Asked to pause.")
    return transitions.to_record(row)


def resume(session: Session, job_id: str) -> JobRecord:
    """Queues a paused job again; one that was asked to pause and runs still just goes on.

    Raises:
        NotFound: there is none.
        Conflict: it isn't paused.
    """
    row = transitions.lock_job(session, job_id)
    if row.status is JobStatus.PAUSED:
        fair_share.reenter_queue(session, row.tenant)
        transitions.stop(session, row, JobStatus.QUEUED)
    elif row.status is JobStatus.RUNNING and row.pending_action == "pause":
        row.pending_action = None
    else:
        hint = " `loramill jobs retry` starts it again." if row.status in RETRYABLE_STATUSES else ""
        raise Conflict(f"Job {job_id} can't be resumed: it is {row.status}, not paused.{hint}")
    transitions.tell(session, row, "Resumed.")
    return transitions.to_record(row)


def retry(session: Session, job_id: str) -> JobRecord:
    """Queues a failed or cancelled job again, with all its attempts.

    It resumes from its last checkpoint if that still exists, and starts over otherwise. A failed job's checkpoints are
    kept for a week; those of a cancelled one are removed at once.

    Raises:
        NotFound: there is none.
        Conflict: it has not failed and was not cancelled; or its data, or the version that it starts from, was deleted.
        QuotaExceeded: its tenant has as many jobs waiting as it may have.
    """
    row = transitions.lock_job(session, job_id)
    if row.status not in RETRYABLE_STATUSES:
        hint = " `loramill jobs resume` resumes it." if row.status is JobStatus.PAUSED else ""
        raise Conflict(f"Job {job_id} can't be retried: it is {row.status}, neither failed nor cancelled.{hint}")
    _check_inputs_exist(session, row)
    fair_share.enter_queue(session, row.tenant)
    before = row.status
    row.pending_action = row.error_code = row.error_message = row.not_before = row.lost_step = row.max_lost_step = None
    row.returned = row.attempt
    if before is JobStatus.CANCELLED:  # no checkpoint is left
        row.step = row.trained_tokens = 0
    transitions.stop(session, row, JobStatus.QUEUED)
    how = "failed" if before is JobStatus.FAILED else "was cancelled"
    transitions.tell(session, row, f"Queued again after it {how}.")
    return transitions.to_record(row)


def preempt(session: Session, job_id: str, attempt: int) -> bool:
    """Asks the worker of this attempt to make room; False if the attempt is over or was asked something already."""
    row = session.get(JobRow, job_id, with_for_update=True)
    if row is None or (row.status, row.attempt, row.pending_action) != (JobStatus.RUNNING, attempt, None):
        return False
    row.pending_action = "preempt"
    transitions.tell(session, row, "Asked to make room for a job of a higher priority.")
    return True


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
    return transitions.add_event(session, transitions.lock_job(session, job_id), level, kind, message, data)


def list_events(session: Session, job_id: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
    """The events of a job whose id is greater than `after`, oldest first."""
    statement = select(EventRow).where(EventRow.job == job_id, EventRow.id > after).order_by(EventRow.id).limit(limit)
    return [JobEvent.model_validate(row) for row in session.scalars(statement)]


def _check_inputs_exist(session: Session, row: JobRow) -> None:
    spec = JobSpec.model_validate(row.spec)
    try:
        for dataset in filter(None, (spec.train, spec.valid)):
            datasets.get(session, dataset, row.tenant)
        if spec.start_from is not None:
            _check_start(session, row.tenant, spec.start_from)
    except NotFound as error:
        raise Conflict(
            f"Job {row.id} can't be retried, since something that it needs was deleted: {error.message} "
            "Submit a new job."
        ) from error


def _check_start(session: Session, tenant: str, version_id: str) -> None:
    mine = select(VersionRow.id).where(
        VersionRow.id == version_id, VersionRow.adapter.startswith(f"{tenant}/", autoescape=True)
    )
    if session.scalar(mine) is None:
        raise NotFound(f"There is no version '{version_id}' to start from.", param="start_from")
