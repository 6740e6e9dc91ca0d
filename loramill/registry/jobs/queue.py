"""The order of queued jobs, and the delay before a failed job is retried."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from loramill.registry.database.tables import AliasRow, JobRow, TenantRow, VersionRow
from loramill.registry.jobs.fair_share import OPEN_STATUSES
from loramill.types import Alias, Executor, JobStatus

#: Maximum delay before a retry, without its jitter.
MAX_BACKOFF_SECONDS = 600.0
#: Maximum delay after an outage of a store, which may end at any time.
MAX_OUTAGE_DELAY_SECONDS = 60.0
#: ID of the advisory lock on PostgreSQL that protects the choice of the next job.
_QUEUE_LOCK_ID = 0x10AA


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A queued job that may start now."""

    id: str
    executor: Executor
    priority: int
    alone: bool


def startable_jobs(
    session: Session, now: float, *, executor: Executor | None, limit: int, base: str | None = None
) -> list[QueuedJob]:
    """Returns the queued jobs that may start now, the next one first.

    They are ordered by priority, then by their tenant's `served`, then by the number of running jobs of their tenant,
    then by age.

    Args:
        executor: only jobs for this executor; None: any.
        base: only jobs of the base with this fingerprint; None: any.
    """
    running = (
        select(JobRow.tenant, func.count().label("jobs"))
        .where(JobRow.status == JobStatus.RUNNING)
        .group_by(JobRow.tenant)
        .subquery()
    )
    statement = (
        select(JobRow.id, JobRow.executor, JobRow.priority, JobRow.alone)
        .join(TenantRow, TenantRow.name == JobRow.tenant)
        .outerjoin(running, running.c.tenant == JobRow.tenant)
        .where(
            JobRow.status == JobStatus.QUEUED,
            or_(JobRow.not_before.is_(None), JobRow.not_before <= now),
            or_(TenantRow.max_running.is_(None), func.coalesce(running.c.jobs, 0) < TenantRow.max_running),
        )
        .order_by(
            JobRow.priority.desc(), TenantRow.served, func.coalesce(running.c.jobs, 0), JobRow.created_at, JobRow.id
        )
        .limit(limit)
    )
    if executor is not None:
        statement = statement.where(JobRow.executor == executor)
    if base is not None:
        statement = statement.where(JobRow.base == base)
    return [
        QueuedJob(row.id, cast(Executor, row.executor), row.priority, row.alone) for row in session.execute(statement)
    ]


def next_job(session: Session, now: float, executor: Executor | None, base: str | None = None) -> JobRow | None:
    """Returns the next job, locked; None if no job may start.

    Args:
        executor: only jobs for this executor; None: any.
        base: only jobs of the base with this fingerprint; None: any.

    Raises:
        Unavailable: the database failed meanwhile.
    """
    # The first query, which finds nothing for most workers of an idle pool, needs no lock.
    while startable_jobs(session, now, executor=executor, limit=1, base=base):
        lock_queue(session)
        for found in startable_jobs(session, now, executor=executor, limit=1, base=base):
            row = _still_queued(session, found.id)
            if row is not None:
                return row
    return None


def job_by_id(session: Session, job_id: str, base: str | None = None) -> JobRow | None:
    """Returns this job, locked, if it is queued and its tenant may have one more running job; otherwise None.

    Args:
        base: None is returned for jobs of other bases than the one with this fingerprint; None: any base.
    """
    lock_queue(session)
    row = _still_queued(session, job_id)
    if row is None or base not in (None, row.base):
        return None
    limit = session.scalar(select(TenantRow.max_running).where(TenantRow.name == row.tenant))
    running = select(func.count()).where(JobRow.tenant == row.tenant, JobRow.status == JobStatus.RUNNING)
    return row if limit is None or (session.scalar(running) or 0) < limit else None


def lock_queue(session: Session) -> None:
    """Lets one worker at a time choose a job until its transaction ends, so that shares and quotas hold exactly.

    On SQLite nothing is needed, since there is only one writer at a time.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_QUEUE_LOCK_ID)))


def expired_leases(session: Session, now: float) -> Sequence[JobRow]:
    """Returns the running jobs whose lease has expired, locked; skips those that another transaction has locked."""
    statement = (
        select(JobRow)
        .where(JobRow.status == JobStatus.RUNNING, JobRow.lease_until <= now)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).all()


def count_open(session: Session) -> int:
    """Returns the number of jobs that are queued or running."""
    return session.scalar(select(func.count()).select_from(JobRow).where(JobRow.status.in_(OPEN_STATUSES))) or 0


def count_other_bases(session: Session, base: str, served: Collection[str] = ()) -> tuple[int, int]:
    """Counts the open jobs of other bases than `base`, and the champions whose base is not served.

    Args:
        base: fingerprint of the base that jobs train on.
        served: fingerprints of the other served bases.
    """
    open_states = [status for status in JobStatus if not status.final]
    waiting = select(func.count()).select_from(JobRow).where(JobRow.status.in_(open_states), JobRow.base != base)
    champions = (
        select(func.count())
        .select_from(AliasRow)
        .join(VersionRow, (VersionRow.adapter == AliasRow.adapter) & (VersionRow.id == AliasRow.version))
        .where(AliasRow.alias == Alias.CHAMPION, VersionRow.base.not_in({base, *served}))
    )
    return session.scalar(waiting) or 0, session.scalar(champions) or 0


def backoff_delay(
    initial_seconds: float, failures: int, job_id: str, attempt: int, *, max_seconds: float = MAX_BACKOFF_SECONDS
) -> float:
    """Returns the delay before the next attempt, in seconds: doubled by each failure, with a jitter of up to a half.

    The jitter is a function of the job and the attempt, so that jobs that failed together are not retried together.

    Args:
        initial_seconds: delay before the first retry.
        failures: number of failures so far, at least 1.
        max_seconds: maximum delay, before the jitter.
    """
    digest = hashlib.sha256(f"{job_id} {attempt}".encode()).digest()
    jitter = 0.5 + int.from_bytes(digest[:8], "big") / 2**64
    return float(min(initial_seconds * 2.0 ** min(failures - 1, 60), max_seconds) * jitter)


def _still_queued(session: Session, job_id: str) -> JobRow | None:
    return session.scalar(
        select(JobRow)
        .where(JobRow.id == job_id, JobRow.status == JobStatus.QUEUED)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
