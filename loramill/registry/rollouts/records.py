"""The rollouts of adapters: reading, opening and ending them. What moves aliases is in `moves`."""

from __future__ import annotations

import time

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry.database.tables import RolloutRow
from loramill.types import Alias, RolloutKind, RolloutOutcome, RolloutRecord, WatchPolicy


def find_open(session: Session, name: AdapterName | str) -> RolloutRecord | None:
    """Returns the open rollout of an adapter."""
    row = _open_row(session, name)
    return None if row is None else RolloutRecord.model_validate(row)


def list_open(session: Session) -> list[RolloutRecord]:
    """Returns the open rollouts of all adapters, oldest first."""
    rows = session.scalars(select(RolloutRow).where(RolloutRow.open.is_(True)).order_by(RolloutRow.id))
    return [RolloutRecord.model_validate(row) for row in rows]


def list_rollouts(
    session: Session, *, name: AdapterName | str | None = None, run: str | None = None, limit: int = 20
) -> list[RolloutRecord]:
    """Returns the rollouts of an adapter, or those that a nightly run started, newest first."""
    statement = select(RolloutRow).order_by(RolloutRow.id.desc()).limit(limit)
    if name is not None:
        statement = statement.where(RolloutRow.adapter == str(name))
    if run is not None:
        statement = statement.where(RolloutRow.run == run)
    return [RolloutRecord.model_validate(row) for row in session.scalars(statement)]


def list_around(session: Session, run: str, *, since: float, until: float) -> list[RolloutRecord]:
    """Returns the rollouts that a nightly run started, and those that were open between two times, newest first."""
    open_between = (func.coalesce(RolloutRow.ended_at, until) >= since) & (RolloutRow.started_at <= until)
    rows = session.scalars(
        select(RolloutRow).where((RolloutRow.run == run) | open_between).order_by(RolloutRow.id.desc())
    )
    return [RolloutRecord.model_validate(row) for row in rows]


def add(
    session: Session,
    name: AdapterName | str,
    *,
    kind: RolloutKind,
    version: str,
    baseline: str,
    share: float,
    run: str | None,
    policy: WatchPolicy,
    started_at: float,
    ends_at: float | None,
) -> RolloutRecord:
    """Records an open rollout of an adapter that has none; the caller has locked the adapter."""
    row = RolloutRow(
        adapter=str(name),
        open=True,
        kind=kind,
        version=version,
        baseline=baseline,
        share=share,
        run=run,
        policy=policy.model_dump(),
        started_at=started_at,
        ends_at=ends_at,
        reason="",
    )
    session.add(row)
    session.flush()
    return RolloutRecord.model_validate(row)


def change(
    session: Session,
    name: AdapterName | str,
    *,
    kind: RolloutKind,
    share: float,
    ends_at: float | None,
    policy: WatchPolicy,
) -> RolloutRecord:
    """Changes the open rollout of an adapter, which has one."""
    row = _open_row(session, name)
    assert row is not None
    row.kind, row.share, row.ends_at, row.policy = kind, share, ends_at, policy.model_dump()
    session.flush()
    return RolloutRecord.model_validate(row)


def end(
    session: Session, name: AdapterName | str, outcome: RolloutOutcome, reason: str, now: float | None = None
) -> RolloutRecord | None:
    """Ends the open rollout of an adapter, if it has one; the caller has locked the adapter."""
    row = _open_row(session, name)
    if row is None:
        return None
    row.open, row.ended_at = None, time.time() if now is None else now
    row.outcome, row.reason = outcome, reason
    session.flush()
    return RolloutRecord.model_validate(row)


def end_if_moved(session: Session, name: AdapterName | str, aliases: dict[Alias, str], reason: str) -> None:
    """Ends the open rollout of an adapter unless its aliases still point to the versions that it compares."""
    rollout = find_open(session, name)
    if rollout is None or _holds(rollout, aliases):
        return
    outcome = RolloutOutcome.ENDED
    if rollout.kind is RolloutKind.WATCH:
        if aliases.get(Alias.PREVIOUS) == rollout.version and aliases.get(Alias.CHAMPION) == rollout.baseline:
            outcome = RolloutOutcome.ROLLED_BACK
    elif aliases.get(Alias.CHAMPION) == rollout.version:
        outcome = RolloutOutcome.PROMOTED
    end(session, name, outcome, reason)


def _holds(rollout: RolloutRecord, aliases: dict[Alias, str]) -> bool:
    if rollout.kind is RolloutKind.WATCH:
        return (aliases.get(Alias.CHAMPION), aliases.get(Alias.PREVIOUS)) == (rollout.version, rollout.baseline)
    return (aliases.get(Alias.CHALLENGER), aliases.get(Alias.CHAMPION)) == (rollout.version, rollout.baseline)


def _open_row(session: Session, name: AdapterName | str) -> RolloutRow | None:
    return session.scalar(select(RolloutRow).where(RolloutRow.adapter == str(name), RolloutRow.open.is_(True)))
