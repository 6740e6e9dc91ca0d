"""Reads the versions of adapters with everything that refers to them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, select, union
from sqlalchemy.orm import InstrumentedAttribute, Session

from loramill.registry.database.tables import (
    AdapterDataRow,
    AliasRow,
    CheckpointRow,
    EvaluationRow,
    JobRow,
    NightlyRunRow,
    NightlyStepRow,
    UsageRow,
    VersionRow,
)
from loramill.registry.retention.policy import DAY_SECONDS, StoredVersion
from loramill.types import JobStatus

_OPEN_STATUSES = [status for status in JobStatus if not status.final]


def read(session: Session, tenant: str, adapter: str | None = None, *, now: float) -> dict[str, list[StoredVersion]]:
    """Returns the versions of a tenant's adapters, or of one of them, by adapter, newest first."""
    of_tenant = VersionRow.adapter.startswith(f"{tenant}/", autoescape=True)
    chosen = of_tenant if adapter is None else VersionRow.adapter == adapter
    versions = session.scalars(select(VersionRow).where(chosen).order_by(VersionRow.created_at.desc(), VersionRow.id))
    found: defaultdict[str, list[VersionRow]] = defaultdict(list)
    for row in versions:
        found[row.adapter].append(row)
    if not found:
        return {}
    pins, steps = _pins(session, tenant, now), _checkpoint_steps(session, tenant)
    return {
        name: [_stored(row, steps, [*pins[name, ""], *pins["", row.id], *pins[name, row.id]]) for row in rows]
        for name, rows in found.items()
    }


def _stored(
    row: VersionRow, steps: Mapping[tuple[str, str], Sequence[tuple[str, int]]], pins: Sequence[str]
) -> StoredVersion:
    of_version = tuple(steps.get((row.adapter, row.id), ()))
    return StoredVersion(row.id, row.created_at, row.bytes, row.job, of_version, tuple(pins))


def _pins(session: Session, tenant: str, now: float) -> defaultdict[tuple[str, str], list[str]]:
    """What refers to versions, by adapter and version; an empty adapter or version stands for all of the tenant's."""
    pins: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    def of_tenant(column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        return column.startswith(f"{tenant}/", autoescape=True)

    aliases = select(AliasRow.adapter, AliasRow.version, AliasRow.alias).where(of_tenant(AliasRow.adapter))
    for adapter, version, alias in session.execute(aliases.order_by(AliasRow.alias)):
        pins[adapter, version].append(str(alias))
    evaluated = select(EvaluationRow.adapter, EvaluationRow.version).where(of_tenant(EvaluationRow.adapter)).distinct()
    for adapter, tried in session.execute(evaluated.where(EvaluationRow.version.is_not(None))):
        pins[adapter, str(tried)].append("evaluated")
    starts = JobRow.spec["start_from"].as_string()
    waiting = select(JobRow.id, starts).where(JobRow.tenant == tenant, JobRow.status.in_(_OPEN_STATUSES))
    for job, version in session.execute(waiting.where(starts.is_not(None))):
        pins["", version].append(f"{job} starts from it")
    open_run = NightlyRunRow.open.is_(True)
    nightly = union(
        *(
            select(table.adapter, table.run)
            .join(NightlyRunRow, NightlyRunRow.id == table.run)
            .where(open_run, of_tenant(table.adapter))
            for table in (NightlyStepRow, AdapterDataRow)
        )
    )
    for adapter, run in session.execute(nightly):
        pins[adapter, ""].append(f"{run} is running")
    yesterday = time.strftime("%Y-%m-%d", time.gmtime(now - DAY_SECONDS))
    used = select(UsageRow.version).where(UsageRow.tenant == tenant, UsageRow.day >= yesterday).distinct()
    for version in filter(None, session.scalars(used)):
        pins["", version].append("requested since yesterday")
    return pins


def _checkpoint_steps(session: Session, tenant: str) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """The job and the step of each version that is a checkpoint and no job's result, by adapter and version."""
    adapter = JobRow.spec["adapter"].as_string()
    rows = session.execute(
        select(adapter, CheckpointRow.version, CheckpointRow.job, CheckpointRow.step)
        .join(JobRow, JobRow.id == CheckpointRow.job)
        .where(JobRow.tenant == tenant, CheckpointRow.version.is_not(None))
    )
    results = select(adapter, JobRow.version).where(JobRow.tenant == tenant, JobRow.version.is_not(None))
    published = set(session.execute(results).tuples())
    steps: defaultdict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for name, version, job, step in rows:
        if (name, version) not in published:
            steps[name, str(version)].append((job, step))
    return dict(steps)
