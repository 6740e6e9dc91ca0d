"""Tenants, their fair shares and their limits."""

from __future__ import annotations

import math
import time

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from loramill.names import check_name
from loramill.registry.database.tables import CompletionRow, DatasetRow, JobRow, TenantRow, VersionRow
from loramill.types import CompletionStorage, JobStatus, Limits, TenantRecord


def create(session: Session, name: str) -> TenantRecord:
    """Adds a tenant.

    Raises:
        InvalidRequest: the name is not valid.
        Conflict: the tenant already exists.
    """
    row = TenantRow(name=check_name(name, "tenant"), created_at=time.time())
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError as error:
        raise Conflict(f"The tenant '{name}' already exists.", param="name") from error
    return TenantRecord.model_validate(row)


def get(session: Session, name: str) -> TenantRecord:
    """Returns the tenant with this name.

    Raises:
        NotFound: there is no such tenant.
    """
    row = session.scalar(select(TenantRow).where(TenantRow.name == name))
    if row is None:
        raise NotFound(f"There is no tenant '{name}'.", param="tenant")
    return TenantRecord.model_validate(row)


def list_tenants(session: Session) -> list[TenantRecord]:
    """Returns all tenants, by name."""
    return [TenantRecord.model_validate(row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name))]


def set_fair_share(
    session: Session,
    name: str,
    *,
    weight: float = 1.0,
    max_running: int | None = None,
    max_queued: int | None = None,
) -> TenantRecord:
    """Sets a tenant's share of the pool, and its quotas.

    Args:
        weight: share relative to the other tenants' weights.
        max_running: maximum number of running jobs; None: no limit.
        max_queued: maximum number of queued and paused jobs; None: no limit.

    Raises:
        NotFound: there is no such tenant.
        InvalidRequest: the weight is not above 0, or a quota is below 0.
    """
    if not 0 < weight < math.inf:
        raise InvalidRequest(f"The weight is {weight}; give a number above 0.", param="weight")
    for param, quota in (("max_running", max_running), ("max_queued", max_queued)):
        if quota is not None and quota < 0:
            raise InvalidRequest(f"'{param}' is {quota}; give 0 or more jobs, or nothing for no limit.", param=param)
    row = _locked_row(session, name)
    row.weight, row.max_running, row.max_queued = weight, max_running, max_queued
    session.flush()
    return TenantRecord.model_validate(row)


def set_limits(session: Session, name: str, limits: Limits) -> TenantRecord:
    """Sets a tenant's limits at the gateways.

    Raises:
        NotFound: there is no such tenant.
    """
    row = _locked_row(session, name)
    for limit in Limits.model_fields:
        setattr(row, limit, getattr(limits, limit))
    session.flush()
    return TenantRecord.model_validate(row)


def set_storage(session: Session, name: str, storage: CompletionStorage) -> TenantRecord:
    """Sets whether a tenant's completions may be stored, and for how long.

    Raises:
        NotFound: there is no such tenant.
    """
    row = _locked_row(session, name)
    row.store_completions, row.completion_days = storage.store_completions, storage.completion_days
    session.flush()
    return TenantRecord.model_validate(row)


def lock(session: Session, name: str) -> None:
    """Locks a tenant until the transaction ends, so that no one can submit a job for it.

    Raises:
        NotFound: there is no such tenant.
    """
    _locked_row(session, name)


def job_counts(session: Session) -> dict[str, tuple[int, int]]:
    """Returns the number of running and of waiting (queued or paused) jobs of each tenant that has any."""
    running = func.count().filter(JobRow.status == JobStatus.RUNNING)
    waiting = func.count().filter(JobRow.status.in_((JobStatus.QUEUED, JobStatus.PAUSED)))
    open_states = [status for status in JobStatus if not status.final]
    statement = select(JobRow.tenant, running, waiting).where(JobRow.status.in_(open_states)).group_by(JobRow.tenant)
    return {tenant: (runs, waits) for tenant, runs, waits in session.execute(statement)}


def check_storage_quota(session: Session, name: str, size: int, *, lock: bool = False) -> None:
    """Checks that a tenant may store `size` more bytes.

    Args:
        lock: locks the tenant until the transaction ends, so that the result stays true; for writers.

    Raises:
        NotFound: there is no such tenant.
        QuotaExceeded: the tenant's limit is too small.
    """
    limit = _locked_row(session, name).stored_bytes if lock else get(session, name).stored_bytes
    if limit is None:
        return
    stored = count_stored_bytes(session, name)
    if stored + size > limit:
        raise QuotaExceeded(
            f"'{name}' stores {stored} bytes and may store {limit}, and this file has {size}: delete files that no job "
            "needs, or stored completions, or ask an admin for a larger limit."
        )


def count_stored_bytes(session: Session, name: str) -> int:
    """Returns the bytes of a tenant's files, imported adapters and stored completions."""
    uploaded = select(func.coalesce(func.sum(DatasetRow.bytes), 0)).where(DatasetRow.tenant == name)
    imported = select(func.coalesce(func.sum(VersionRow.bytes), 0)).where(
        VersionRow.job.is_(None), VersionRow.adapter.startswith(f"{name}/", autoescape=True)
    )
    completions = select(func.coalesce(func.sum(CompletionRow.bytes), 0)).where(CompletionRow.tenant == name)
    return sum(int(session.scalar(each) or 0) for each in (uploaded, imported, completions))


def _locked_row(session: Session, name: str) -> TenantRow:
    row = session.scalar(select(TenantRow).where(TenantRow.name == name).with_for_update())
    if row is None:
        raise NotFound(f"There is no tenant '{name}'.", param="tenant")
    return row
