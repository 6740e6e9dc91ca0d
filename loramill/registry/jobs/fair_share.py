"""Fair shares: the tenant with the smallest `served`, the tokens leased to its jobs divided by its weight, is next.

This is weighted fair queueing with tokens instead of bytes (Demers, Keshav, Shenker 1989). The tokens that a job has
left are charged when it is leased, and those that it did not train on are refunded when it stops. A tenant that was
idle is raised to the minimum of the tenants with open jobs, so that no tenant saves up a claim to the whole pool.
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
    """Charges the tenant for the tokens that a leased job has left."""
    _add_served(session, job, job.cost - job.trained_tokens)


def refund(session: Session, job: JobRow) -> None:
    """Corrects the charge to the tokens that the job trained on, which can also be more than its cost."""
    _add_served(session, job, job.trained_tokens - job.cost)


def enter_queue(session: Session, tenant: str) -> None:
    """Checks that the tenant may queue one more job, and raises the `served` of a tenant without open jobs.

    Raises:
        NotFound: there is no such tenant.
        QuotaExceeded: the tenant has as many waiting jobs as its quota allows.
    """
    # Locks the tenant until the job is inserted: of two concurrent submissions, the second counts the first one's job.
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
                f"'{tenant}' has {waiting} waiting jobs and may have {found.max_queued}: submit again when some have "
                "started, cancel one, or ask an admin for a larger quota."
            )
    if not found.busy:
        _raise_to_minimum(session, tenant)


def reenter_queue(session: Session, tenant: str) -> None:
    """Raises the `served` of a tenant without open jobs, one of whose jobs is about to be queued again."""
    if not session.execute(_TENANT, {"tenant": tenant}).one().busy:
        _raise_to_minimum(session, tenant)


def _raise_to_minimum(session: Session, tenant: str) -> None:
    minimum = session.scalar(select(func.min(TenantRow.served)).where(_open_jobs(TenantRow.name)))
    if minimum is not None:
        session.execute(
            update(TenantRow).where(TenantRow.name == tenant, TenantRow.served < minimum).values(served=minimum),
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
