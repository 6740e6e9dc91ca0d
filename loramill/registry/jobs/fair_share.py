"""Fair shares: a tenant's `served` is the tokens its jobs were leased for, over its weight; who has least comes next.

That is weighted fair queueing with tokens for bytes (Demers, Keshav, Shenker 1989): what a job has left to do is
charged when it is leased, and what it did not do is given back when it stops. A tenant that was idle is lifted to the
least of those with open jobs, so that nobody saves up a claim to the whole pool.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Exists, bindparam, exists, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from loramill.errors import NotFound, QuotaExceeded
from loramill.registry.database.tables import JobRow, TenantRow
from loramill.types import JobStatus

OPEN_STATUSES = (JobStatus.QUEUED, JobStatus.RUNNING)
WAITING_STATUSES = (JobStatus.QUEUED, JobStatus.PAUSED)


def charge(session: Session, job: JobRow) -> None:
    """Charges the tenant with what a leased job has left to do."""
    _add_served(session, job, job.cost - job.trained_tokens)


def refund(session: Session, job: JobRow) -> None:
    """Corrects what was charged to what was done; the same for a job that took more than its cost."""
    _add_served(session, job, job.trained_tokens - job.cost)


def enter_queue(session: Session, tenant: str) -> None:
    """Makes room in the queue for one more of the tenant's jobs, and lifts a tenant that had none open.

    Raises:
        NotFound: there is no such tenant.
        QuotaExceeded: it has as many jobs waiting as its quota allows.
    """
    # Held until the job is there: of two that submit at once, the second counts the first one's.
    found = session.execute(_TENANT, {"tenant": tenant}).one_or_none()
    if found is None:
        raise NotFound(f"There is no tenant '{tenant}'.", param="tenant")
    if found.max_queued is not None:
        waiting = (
            session.scalar(select(func.count()).where(JobRow.tenant == tenant, JobRow.status.in_(WAITING_STATUSES)))
            or 0
        )
        if waiting >= found.max_queued:
            raise QuotaExceeded(
                f"'{tenant}' has {waiting} jobs waiting and may have {found.max_queued}: submit again when some have "
                "started, cancel one, or ask an admin for a larger quota."
            )
    if not found.busy:
        _raise_to_minimum(session, tenant)


def reenter_queue(session: Session, tenant: str) -> None:
    """Lifts a tenant, one of whose jobs goes on, if it has no open one."""
    if not session.execute(_TENANT, {"tenant": tenant}).one().busy:
        _raise_to_minimum(session, tenant)


def _raise_to_minimum(session: Session, tenant: str) -> None:
    least = session.scalar(select(func.min(TenantRow.served)).where(_open_jobs(TenantRow.name)))
    if least is not None:
        session.execute(
            update(TenantRow).where(TenantRow.name == tenant, TenantRow.served < least).values(served=least),
            execution_options={"synchronize_session": False},
        )


def _open_jobs(tenant: ColumnElement[str] | InstrumentedAttribute[str]) -> Exists:
    return exists().where(JobRow.tenant == tenant, JobRow.status.in_(OPEN_STATUSES))


_TENANT = (
    select(TenantRow.max_queued, _open_jobs(TenantRow.name).label("busy"))
    .where(TenantRow.name == bindparam("tenant"))
    .with_for_update(of=TenantRow)
)


def _add_served(session: Session, job: JobRow, tokens: float) -> None:
    statement = (
        update(TenantRow)
        .where(TenantRow.name == job.tenant)
        .values(served=TenantRow.served + tokens / TenantRow.weight)
    )
    session.execute(statement, execution_options={"synchronize_session": False})
