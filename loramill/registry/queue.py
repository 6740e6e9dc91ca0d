"""Which job comes next."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from loramill.registry.tables import JobRow
from loramill.types import JobStatus


def next_job(session: Session, now: float) -> JobRow | None:
    """The oldest waiting job of the tenant with the fewest running jobs, locked; None when nothing waits."""
    running = (
        select(JobRow.tenant, func.count().label("jobs"))
        .where(JobRow.status == JobStatus.RUNNING, JobRow.lease_until > now)
        .group_by(JobRow.tenant)
        .subquery()
    )
    # A tenant's second waiting job comes as late as if its first ran already: so two workers that choose at the
    # same moment, one skipping the row that the other has locked, are as fair as one after the other.
    place = func.row_number().over(partition_by=JobRow.tenant, order_by=(JobRow.created_at, JobRow.id))
    turns = (
        select(JobRow.id, (func.coalesce(running.c.jobs, 0) + place).label("turn"))
        .outerjoin(running, running.c.tenant == JobRow.tenant)
        .where(_waits(now))
        .subquery()
    )
    return session.scalar(
        select(JobRow)
        .join(turns, turns.c.id == JobRow.id)
        .where(_waits(now))
        .order_by(turns.c.turn, JobRow.created_at, JobRow.id)
        .limit(1)
        .with_for_update(of=JobRow, skip_locked=True)
        .execution_options(populate_existing=True)
    )


def lost_for_good(session: Session, now: float, max_attempts: int) -> Sequence[JobRow]:
    """Running jobs whose lease has run out and that must not start again: cancelled, or out of attempts; locked."""
    used_up = JobRow.attempt - JobRow.returned >= max_attempts
    statement = (
        select(JobRow)
        .where(_expired(now), or_(used_up, JobRow.asked == "cancel"))
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).all()


def count_open(session: Session) -> int:
    """How many jobs are queued or running."""
    open_states = (JobStatus.QUEUED, JobStatus.RUNNING)
    return session.scalar(select(func.count()).select_from(JobRow).where(JobRow.status.in_(open_states))) or 0


def _waits(now: float) -> ColumnElement[bool]:
    return or_(JobRow.status == JobStatus.QUEUED, _expired(now))


def _expired(now: float) -> ColumnElement[bool]:
    return and_(JobRow.status == JobStatus.RUNNING, JobRow.lease_until <= now)
