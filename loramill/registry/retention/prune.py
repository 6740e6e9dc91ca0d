"""Removes the versions that retention no longer keeps; the clean-up then deletes their files.

A version is removed from the database first. Its files stay for `PRUNED_GRACE_SECONDS`, so that a request or a job that
began before can still load them; whenever a process is killed, no version is recorded whose files are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.errors import NotFound
from loramill.registry import Registry, adapters, deletion
from loramill.registry.database.tables import AdapterRow, CheckpointRow, JobRow, PrunedVersionRow, TenantRow, VersionRow
from loramill.registry.retention import stored
from loramill.registry.retention.policy import StoredVersion, decide, keeps_everything
from loramill.types import Removal, RetentionPolicy

log = logging.getLogger(__name__)

#: Called in the transaction that removes versions of one adapter.
OnPruned = Callable[[Session, str, Sequence[Removal]], None]


def plan(
    session: Session, default: RetentionPolicy, *, now: float, tenant: str | None = None, adapter: str | None = None
) -> list[Removal]:
    """Returns what `prune` would remove, by adapter, newest first; changes nothing.

    Args:
        default: retention of the adapters that have none of their own.
        tenant: only this tenant's adapters; None: those of all tenants.
        adapter: only this adapter, of `tenant`.
    """
    rows = select(AdapterRow.name, AdapterRow.tenant, AdapterRow.retention).order_by(AdapterRow.name)
    if tenant is not None:
        rows = rows.where(AdapterRow.tenant == tenant)
    if adapter is not None:
        rows = rows.where(AdapterRow.name == adapter)
    policies: dict[str, dict[str, RetentionPolicy]] = {}
    for name, owner, own in session.execute(rows):
        policy = default if own is None else RetentionPolicy.model_validate(own)
        if not keeps_everything(policy):
            policies.setdefault(owner, {})[name] = policy
    return [
        removal
        for owner, of_tenant in policies.items()
        for name, versions in stored.read(session, owner, adapter, now=now).items()
        if name in of_tenant
        for removal in _removals(name, versions, of_tenant[name], now)
    ]


def prune(
    registry: Registry,
    default: RetentionPolicy,
    *,
    now: float,
    tenant: str | None = None,
    on_pruned: OnPruned | None = None,
) -> list[Removal]:
    """Removes versions, one adapter per transaction; returns what was removed.

    What refers to a version in the meantime keeps it: each transaction locks the adapter and decides again.

    Args:
        default: retention of the adapters that have none of their own.
        tenant: only this tenant's adapters; None: those of all tenants.
        on_pruned: called in each transaction, for example to record it in the audit.
    """
    with registry.reading() as session:
        planned = plan(session, default, now=now, tenant=tenant)
    removed: list[Removal] = []
    for name in dict.fromkeys(each.adapter for each in planned):
        candidates = {each.version for each in planned if each.adapter == name}
        with registry.writing() as session:
            found = _prune_adapter(session, name, candidates, default, now)
            if found and on_pruned is not None:
                on_pruned(session, name, found)
        removed += found
    if removed:
        log.info("retention removed %d versions of %d adapters", len(removed), len({each.adapter for each in removed}))
    return removed


def _prune_adapter(
    session: Session, name: str, candidates: set[str], default: RetentionPolicy, now: float
) -> list[Removal]:
    """Removes those of the candidates that retention removes now."""
    tenant = name.partition("/")[0]
    try:
        _lock(session, name, candidates)
    except NotFound:
        return []  # deleted or renamed since it was planned
    removals = plan(session, default, now=now, tenant=tenant, adapter=name)
    removals = [each for each in removals if each.version in candidates]
    for each in removals:
        deletion.remove_version(session, adapters.get_owned_version(session, name, each.version))
        session.merge(PrunedVersionRow(adapter=name, version=each.version, reason=each.reason, pruned_at=now))
    session.flush()
    return removals


def _lock(session: Session, name: str, versions: Iterable[str]) -> None:
    """Locks jobs, adapter and versions, in the order in which a worker that publishes locks them.

    With the adapter, no alias moves. With a version, no evaluation of it and no job that starts from it is inserted.
    The tenant, to which the audit refers, comes before the versions, as in a submission.
    """
    ids = list(versions)
    made_by = select(VersionRow.job).where(VersionRow.adapter == name, VersionRow.id.in_(ids))
    checkpoints_of = select(CheckpointRow.job).where(CheckpointRow.version.in_(ids))
    jobs = select(JobRow.id).where(JobRow.id.in_(made_by) | JobRow.id.in_(checkpoints_of)).order_by(JobRow.id)
    session.execute(jobs.with_for_update())
    tenant = select(TenantRow.id).where(TenantRow.name == name.partition("/")[0])
    session.execute(tenant.with_for_update(read=True, key_share=True))
    adapters.lock(session, name)
    rows = select(VersionRow.id).where(VersionRow.adapter == name, VersionRow.id.in_(ids)).order_by(VersionRow.id)
    session.execute(rows.with_for_update())


def _removals(name: str, versions: Sequence[StoredVersion], policy: RetentionPolicy, now: float) -> list[Removal]:
    return [
        Removal(
            adapter=name,
            version=decision.version.id,
            kind="checkpoint" if decision.version.checkpoint_steps else "version",
            job=decision.version.job,
            bytes=decision.version.bytes,
            created_at=decision.version.created_at,
            reason=decision.reason,
        )
        for decision in decide(versions, policy, now=now)
        if decision.remove
    ]
