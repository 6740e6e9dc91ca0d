"""Deleting adapters, versions and tenants, each in the caller's transaction and with everything that belongs to it.

After the commit, nothing refers to what was deleted. Its content stays until the next clean-up, or longer if another
version or dataset has the same content. Usage and audit rows are kept; those of a deleted tenant lose all names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Update, case, delete, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Delete

from loramill.errors import Conflict
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.registry import adapters, tenants, usage
from loramill.registry.database.tables import (
    AdapterContentRow,
    AdapterDataRow,
    AdapterRow,
    AliasChangeRow,
    AliasRow,
    AuditRow,
    CheckpointRow,
    CompletionRow,
    DatasetRow,
    DeletedUserRow,
    EvaluationRow,
    EventRow,
    JobRow,
    KeyRow,
    NightlyAnswerRow,
    NightlyStepRow,
    PrunedVersionRow,
    RateWindowRow,
    RolloutRow,
    SourceFileRow,
    TenantRow,
    UsageRow,
    VersionRow,
    VersionTrafficRow,
)
from loramill.registry.jobs import transitions
from loramill.types import Alias, DeletionSummary, JobStatus, VersionRecord

_OPEN_STATUSES = [status for status in JobStatus if not status.final]
#: Maximum number of jobs that an error message names; a tenant may have thousands.
_MAX_NAMED_JOBS = 5


def delete_adapter(session: Session, name: AdapterName | str, *, cancel_jobs: bool = False) -> DeletionSummary:
    """Deletes an adapter with its versions, aliases, evaluations, new data, stored completions, nightly steps and jobs.

    Datasets stay, since they belong to the tenant.

    Args:
        cancel_jobs: cancel the adapter's jobs that have not ended; their workers stop at their next heartbeat.

    Raises:
        NotFound: the adapter does not exist.
        Conflict: a job that has not ended trains it or starts from one of its versions, and `cancel_jobs` is false.
    """
    tenant = adapters.get(session, name).tenant
    of_adapter = JobRow.spec["adapter"].as_string() == str(name)
    versions = select(VersionRow.id).where(VersionRow.adapter == str(name))
    uses = or_(of_adapter, JobRow.spec["start_from"].as_string().in_(versions))
    # Jobs are locked before their adapter, in the order in which a worker that publishes locks the two.
    cancelled = _cancel_or_refuse(
        session, _open_jobs(session, tenant, uses), f"the adapter '{name}'", cancel=cancel_jobs
    )
    adapters.lock(session, name)
    found = len(session.scalars(versions).all())
    _remove_adapters(session, AdapterRow.name == str(name))
    jobs = _remove_jobs(session, (JobRow.tenant == tenant) & of_adapter)
    return DeletionSummary(versions=found, jobs=jobs, cancelled=cancelled)


def delete_version(session: Session, name: AdapterName | str, version: str, *, force: bool = False) -> DeletionSummary:
    """Deletes a version (given by its full hash) with its evaluations.

    Its job stays. The history keeps the moves of aliases to the version, without a reference, so that it has no gap.

    Args:
        force: delete the challenger or the previous champion as well; that alias then points to no version.

    Raises:
        NotFound: the adapter or the version does not exist.
        Conflict: the version is the champion; or another alias points to it and `force` is false; or a job that has not
            ended starts from it.
    """
    adapter = adapters.get(session, name)
    starts = JobRow.spec["start_from"].as_string() == version
    shown = f"{name}@{version[:SHORT_HASH_LENGTH]}"
    _cancel_or_refuse(session, _open_jobs(session, adapter.tenant, starts), f"the version '{shown}'", cancel=False)
    adapters.lock(session, name)
    row = adapters.get_owned_version(session, name, version)
    _release_aliases(session, name, version, shown, force=force)
    remove_version(session, row)
    return DeletionSummary(versions=1)


def remove_version(session: Session, version: VersionRecord) -> None:
    """Removes a version that no alias points to, with its evaluations; the caller has locked its adapter.

    Its job and its checkpoints stay, without it. The moves of aliases to it stay in the history.
    """
    name, id_ = version.adapter, version.id
    of_version = (AliasChangeRow.adapter == name) & (AliasChangeRow.version == id_)
    note = f" ({id_[:SHORT_HASH_LENGTH]}, since deleted)"
    _execute(
        session, update(AliasChangeRow).where(of_version).values(version=None, reason=AliasChangeRow.reason + note)
    )
    _execute(session, delete(EvaluationRow).where(EvaluationRow.adapter == name, EvaluationRow.version == id_))
    tenant = AdapterName.parse(name).tenant
    jobs = select(JobRow.id).where(JobRow.tenant == tenant, JobRow.spec["adapter"].as_string() == name)
    checkpoints = (CheckpointRow.version == id_) & CheckpointRow.job.in_(jobs)
    _execute(session, update(CheckpointRow).where(checkpoints).values(version=None))
    if version.job is not None:
        _execute(session, update(JobRow).where(JobRow.id == version.job, JobRow.version == id_).values(result=None))
    _execute(session, delete(VersionRow).where(VersionRow.adapter == name, VersionRow.id == id_))


def delete_tenant(session: Session, name: str, *, cancel_jobs: bool = False) -> DeletionSummary:
    """Deletes a tenant with its keys, datasets, jobs, adapters, stored completions and limits.

    What stays has no names: the usage is added to that of `usage.DELETED_TENANT`; audit rows keep their time, action,
    key ID, request ID and the IDs of files and jobs, and lose the tenant, names and details.

    Args:
        cancel_jobs: as in `delete_adapter`.

    Raises:
        NotFound: there is no such tenant.
        Conflict: a job of the tenant has not ended, and `cancel_jobs` is false.
    """
    tenants.get(session, name)
    of_tenant = JobRow.tenant == name
    cancelled = _cancel_or_refuse(
        session, _open_jobs(session, name, of_tenant), f"the tenant '{name}'", cancel=cancel_jobs
    )
    tenants.lock(session, name)
    # Jobs that were submitted before the lock; none can be submitted after it.
    cancelled += _cancel_or_refuse(
        session, _open_jobs(session, name, of_tenant), f"the tenant '{name}'", cancel=cancel_jobs
    )
    owned = select(AdapterRow.name).where(AdapterRow.tenant == name)
    versions = len(session.scalars(select(VersionRow.id).where(VersionRow.adapter.in_(owned))).all())
    _remove_adapters(session, AdapterRow.tenant == name)
    jobs = _remove_jobs(session, of_tenant)
    files = _execute(session, delete(DatasetRow).where(DatasetRow.tenant == name))
    for table in (KeyRow, RateWindowRow, SourceFileRow, CompletionRow, DeletedUserRow):
        _execute(session, delete(table).where(table.tenant == name))
    _anonymize_usage(session, name)
    _anonymize_audit(session, name)
    _execute(session, delete(TenantRow).where(TenantRow.name == name))
    return DeletionSummary(versions=versions, jobs=jobs, files=files, cancelled=cancelled)


def _open_jobs(session: Session, tenant: str, condition: ColumnElement[bool]) -> Sequence[JobRow]:
    """Returns the tenant's jobs that have not ended, locked until the transaction ends."""
    statement = (
        select(JobRow).where(JobRow.tenant == tenant, JobRow.status.in_(_OPEN_STATUSES), condition).order_by(JobRow.id)
    )
    return session.scalars(statement.with_for_update().execution_options(populate_existing=True)).all()


def _cancel_or_refuse(session: Session, jobs: Iterable[JobRow], what: str, *, cancel: bool) -> tuple[str, ...]:
    """Cancels jobs, or refuses to delete what they need; returns their IDs."""
    rows = list(jobs)
    ids = tuple(row.id for row in rows)
    if ids and not cancel:
        more = f" and {len(ids) - _MAX_NAMED_JOBS} more" if len(ids) > _MAX_NAMED_JOBS else ""
        raise Conflict(
            f"{what[0].upper()}{what[1:]} cannot be deleted yet: {', '.join(ids[:_MAX_NAMED_JOBS])}{more} "
            f"{'needs' if len(ids) == 1 else 'need'} it and {'has' if len(ids) == 1 else 'have'} not ended. Cancel "
            f"{'it' if len(ids) == 1 else 'them'} (`loramill jobs cancel`), or wait."
        )
    for row in rows:
        transitions.cancel(session, row)
    return ids


def _release_aliases(session: Session, name: AdapterName | str, version: str, shown: str, *, force: bool) -> None:
    """Checks that no alias points to a version, or with `force` makes it so."""
    adapter = adapters.get(session, name)
    if adapter.champion == version:
        raise Conflict(
            f"'{shown}' is the champion and cannot be deleted: promote another version first (`loramill promote {name} "
            f"VERSION`), or delete the adapter (`loramill adapters delete {name}`)."
        )
    for alias in (Alias.CHALLENGER, Alias.PREVIOUS):
        if getattr(adapter, alias) != version:
            continue
        if not force:
            raise Conflict(
                f"'{shown}' is the {'previous champion' if alias is Alias.PREVIOUS else alias}: delete it with `force` "
                f"(`loramill adapters delete {shown} --force`), after which '{name}' has no {alias}."
            )
        adapters.move(session, name, alias, None, f"{version[:SHORT_HASH_LENGTH]} was deleted")


def _remove_adapters(session: Session, condition: ColumnElement[bool]) -> None:
    """Deletes adapters with everything that refers to them, except for their jobs."""
    names = select(AdapterRow.name).where(condition)
    for table in (
        NightlyAnswerRow,
        NightlyStepRow,
        AdapterContentRow,
        AdapterDataRow,
        SourceFileRow,
        EvaluationRow,
        AliasChangeRow,
        AliasRow,
        VersionRow,
        PrunedVersionRow,
        CompletionRow,  # with their feedback
        RolloutRow,
        VersionTrafficRow,
    ):
        _execute(session, delete(table).where(table.adapter.in_(names)))
    _execute(session, delete(AdapterRow).where(condition))


def _remove_jobs(session: Session, condition: ColumnElement[bool]) -> int:
    """Deletes jobs with their events and checkpoints; returns their number."""
    ids = select(JobRow.id).where(condition)
    # Versions of other adapters that these jobs produced stay, without a job.
    _execute(session, update(VersionRow).where(VersionRow.job.in_(ids)).values(job=None))
    for table in (CheckpointRow, EventRow):
        _execute(session, delete(table).where(table.job.in_(ids)))
    return _execute(session, delete(JobRow).where(condition))


def _anonymize_usage(session: Session, tenant: str) -> None:
    rows = session.scalars(select(UsageRow).where(UsageRow.tenant == tenant)).all()
    sums: defaultdict[usage.UsageItem, usage.UsageCount] = defaultdict(usage.UsageCount)
    for row in rows:
        sums[usage.anonymized(usage.UsageItem(row.tenant, row.day, row.model, row.version))] += usage.UsageCount(
            row.requests, row.prompt_tokens, row.completion_tokens
        )
    usage.add(session, sums)
    _execute(session, delete(UsageRow).where(UsageRow.tenant == tenant))


def _anonymize_audit(session: Session, tenant: str) -> None:
    ids = or_(*(AuditRow.action.startswith(f"{kind}.") for kind in ("file", "job", "key")))
    values: dict[str, Any] = {
        "tenant": None,
        "actor": case((AuditRow.actor.is_(None), None), else_=usage.DELETED_TENANT),
        "subject": case((ids, AuditRow.subject), else_=usage.DELETED_TENANT),
        "details": {},
    }
    _execute(session, update(AuditRow).where(AuditRow.tenant == tenant).values(**values))


def _execute(session: Session, statement: Update | Delete) -> int:
    """Executes a statement on many rows, expires what the session has loaded, and returns the number of rows."""
    result = session.execute(statement, execution_options={"synchronize_session": False})
    session.expire_all()
    return int(result.rowcount)  # type: ignore[attr-defined]  # results of these statements have it
