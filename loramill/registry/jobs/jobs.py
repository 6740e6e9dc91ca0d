"""Fine-tune jobs as their owners use them; `leases.py` is for workers."""

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
from loramill.registry.jobs import fair_share, sweeps, transitions
from loramill.registry.pagination import newest_page
from loramill.types import Executor, JobEvent, JobRecord, JobSpec, JobStatus

#: Final statuses that a job can be retried from.
RETRYABLE_STATUSES = (JobStatus.FAILED, JobStatus.CANCELLED)

#: A shortened job ID.
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
        priority: jobs of a higher priority start first, and may preempt others.
        executor: what runs the job.
        cost: number of tokens that the job will train on, prompts included; 0: unknown, so the maximum is assumed.

    Raises:
        NotFound: the tenant does not exist, or does not have a dataset or the version to start from.
        QuotaExceeded: the tenant has as many waiting jobs as its quota allows.
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
        sweep=sweeps.new_candidates(spec),
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    transitions.add_event(session, row, "Queued.")
    return transitions.to_record(row)


def get(session: Session, job_id: str, tenant: str | None = None) -> JobRecord:
    """Returns the job with this ID, or with an ID that begins with it (`ftjob-` and at least 4 digits).

    Args:
        tenant: only a job of this tenant; None: an admin, who sees all jobs.

    Raises:
        NotFound: there is no such job, or it is another tenant's; the message is the same.
        InvalidRequest: several IDs begin with it.
    """
    row = session.get(JobRow, job_id) or _find_by_prefix(session, job_id, tenant)
    if row is None or tenant not in (None, row.tenant):
        raise NotFound(f"There is no fine-tuning job '{job_id}'.", param="fine_tuning_job_id")
    return transitions.to_record(row)


def _find_by_prefix(session: Session, prefix: str, tenant: str | None) -> JobRow | None:
    if not _ID_PREFIX.fullmatch(prefix):
        return None
    # A range of the primary key, for which both databases use its index. "g" sorts after every hexadecimal digit.
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
    """Returns a page of a tenant's jobs, newest first.

    Args:
        tenant: None: jobs of all tenants.
        metadata: only jobs that have all of these entries.

    Raises:
        NotFound: `after` is not the ID of a job of the tenant.
    """
    filters = [JobRow.labels[key].as_string() == value for key, value in (metadata or {}).items()]
    return [transitions.to_record(row) for row in newest_page(session, JobRow, tenant, after, limit, filters)]


def list_by_metadata(session: Session, key: str, values: Collection[str]) -> list[JobRecord]:
    """Returns all jobs whose metadata has one of these values under `key`, newest first."""
    statement = select(JobRow).where(JobRow.labels[key].as_string().in_(values))
    return [transitions.to_record(row) for row in session.scalars(statement.order_by(JobRow.created_at.desc()))]


def cancel(session: Session, job_id: str) -> JobRecord:
    """Cancels a job: immediately if it is not running, otherwise at its worker's next heartbeat.

    Raises:
        NotFound: there is no such job.
        Conflict: the job has already ended.
    """
    row = transitions.lock_job(session, job_id)
    if row.status.final:
        raise Conflict(f"Job {job_id} cannot be cancelled: it is already {row.status}.")
    if row.status is not JobStatus.RUNNING:
        transitions.cancel(session, row)
    elif row.pending_action != "cancel":
        row.pending_action = "cancel"
        transitions.add_event(session, row, "Cancellation requested.")
    return transitions.to_record(row)


def pause(session: Session, job_id: str) -> JobRecord:
    """Pauses a job: immediately if it is not running, otherwise once its worker has written a checkpoint.

    Raises:
        NotFound: there is no such job.
        Conflict: the job has ended, or is being cancelled.
    """
    row = transitions.lock_job(session, job_id)
    if row.status.final or row.pending_action == "cancel":
        raise Conflict(
            f"Job {job_id} cannot be paused: it is {'being cancelled' if row.pending_action else row.status}."
        )
    if row.status is JobStatus.QUEUED:
        transitions.pause(session, row)
    elif row.status is JobStatus.RUNNING and row.pending_action != "pause":
        row.pending_action = "pause"
        transitions.add_event(session, row, "Pause requested.")
    return transitions.to_record(row)


def resume(session: Session, job_id: str) -> JobRecord:
    """Queues a paused job again; a running job with a pending pause continues to run.

    Raises:
        NotFound: there is no such job.
        Conflict: the job is not paused.
    """
    row = transitions.lock_job(session, job_id)
    if row.status is JobStatus.PAUSED:
        fair_share.reenter_queue(session, row.tenant)
        transitions.stop(session, row, JobStatus.QUEUED)
    elif row.status is JobStatus.RUNNING and row.pending_action == "pause":
        row.pending_action = None
    else:
        hint = " `loramill jobs retry` starts it again." if row.status in RETRYABLE_STATUSES else ""
        raise Conflict(f"Job {job_id} cannot be resumed: it is {row.status}, not paused.{hint}")
    transitions.add_event(session, row, "Resumed.")
    return transitions.to_record(row)


def retry(session: Session, job_id: str) -> JobRecord:
    """Queues a failed or cancelled job again, with all of its attempts.

    The job resumes from its last checkpoint if that still exists, and otherwise starts over. Checkpoints of a failed
    job are kept for a week; those of a cancelled job are deleted immediately.

    Raises:
        NotFound: there is no such job.
        Conflict: the job has neither failed nor been cancelled, or its data or the version that it starts from was
            deleted.
        QuotaExceeded: the tenant has as many waiting jobs as its quota allows.
    """
    row = transitions.lock_job(session, job_id)
    if row.status not in RETRYABLE_STATUSES:
        hint = " `loramill jobs resume` resumes it." if row.status is JobStatus.PAUSED else ""
        raise Conflict(f"Job {job_id} cannot be retried: it is {row.status}, neither failed nor cancelled.{hint}")
    _check_inputs_exist(session, row)
    fair_share.enter_queue(session, row.tenant)
    before = row.status
    row.pending_action = row.error_code = row.error_message = row.not_before = row.lost_step = row.max_lost_step = None
    row.returned, row.alone = row.attempt, False
    if before is JobStatus.CANCELLED:  # no checkpoint is left
        row.step = row.trained_tokens = 0
    if row.sweep and (before is JobStatus.CANCELLED or sweeps.all_failed(row.sweep)):
        row.sweep = sweeps.new_candidates(JobSpec.model_validate(row.spec))
    transitions.stop(session, row, JobStatus.QUEUED)
    how = "failed" if before is JobStatus.FAILED else "was cancelled"
    transitions.add_event(session, row, f"Queued again after it {how}.")
    return transitions.to_record(row)


def preempt(session: Session, job_id: str, attempt: int) -> bool:
    """Preempts this attempt at its next heartbeat; returns False if it is over or has another pending action."""
    row = session.get(JobRow, job_id, with_for_update=True)
    if row is None or (row.status, row.attempt, row.pending_action) != (JobStatus.RUNNING, attempt, None):
        return False
    row.pending_action = "preempt"
    transitions.add_event(session, row, "Preemption requested by a job of a higher priority.")
    return True


def add_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    kind: Literal["message", "metrics"] = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Adds an event to a job's history; `data` is JSON with finite numbers.

    Raises:
        NotFound: there is no such job.
    """
    # The lock on the job makes the IDs of its events increase in the order in which readers see them.
    transitions.add_event(session, transitions.lock_job(session, job_id), message, level=level, kind=kind, data=data)


def list_events(session: Session, job_id: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
    """Returns the events of a job with an ID greater than `after`, oldest first."""
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
            f"Job {row.id} cannot be retried, since something that it needs was deleted: {error.message} "
            "Submit a new job."
        ) from error


def _check_start(session: Session, tenant: str, version_id: str) -> None:
    owned = select(VersionRow.id).where(
        VersionRow.id == version_id, VersionRow.adapter.startswith(f"{tenant}/", autoescape=True)
    )
    # Locked until the job is inserted, so that retention sees the job or the job does not see the version.
    if session.scalar(owned.with_for_update(read=True, key_share=True)) is None:
        raise NotFound(f"There is no version '{version_id}' to start from.", param="start_from")
