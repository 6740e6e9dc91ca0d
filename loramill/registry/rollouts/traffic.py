"""What the answers of versions were like, in rows of a minute, version and gateway."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry.database.tables import RolloutRow, VersionTrafficRow
from loramill.registry.rollouts import records
from loramill.types import RolloutKind, RolloutRecord, RolloutState, TrafficCounts

MINUTE_SECONDS = 60
#: Seconds for which rows are kept after their adapter's rollout has ended, so that it can be looked at.
KEPT_SECONDS = 7 * 86_400.0
_COUNTS = ("requests", "errors", "empty", "cut", "good", "bad", "first_token_seconds", "total_seconds")
_HISTOGRAMS = ("first_token_histogram", "total_histogram")


@dataclass(frozen=True, slots=True, order=True)
class TrafficKey:
    """A version of an adapter in one minute, which is given by its first second since the epoch."""

    adapter: str
    version: str
    minute: int


def minute_of(seconds: float) -> int:
    """Returns the first second of the minute that contains a time."""
    return int(seconds // MINUTE_SECONDS) * MINUTE_SECONDS


def compared_versions(rollouts: Iterable[RolloutRecord]) -> set[tuple[str, str]]:
    """Returns the adapters and versions whose traffic is needed."""
    return {
        (each.adapter, version) for each in rollouts for version in (each.version, each.baseline) if version is not None
    }


def write(session: Session, gateway: str, counts: Mapping[TrafficKey, TrafficCounts]) -> None:
    """Writes a gateway's sums, in place of what it wrote for the same minutes; adapters without a rollout are left out.

    Writing the same again changes nothing, so that a gateway repeats what may not have been written.
    """
    needed = compared_versions(records.list_open(session))
    rows = [
        {"adapter": key.adapter, "version": key.version, "minute": key.minute, "gateway": gateway}
        | _columns(counts[key])
        for key in sorted(counts)
        if (key.adapter, key.version) in needed
    ]
    if not rows:
        return
    insert = _dialect(session).insert(VersionTrafficRow)
    replaced = {name: insert.excluded[name] for name in (*_COUNTS, *_HISTOGRAMS)}
    session.execute(insert.on_conflict_do_update(index_elements=_KEY, set_=replaced), rows)


def add_rating(
    session: Session, name: AdapterName | str, version: str, *, good: bool, now: float | None = None
) -> None:
    """Counts a rating of an answer, if a rollout compares its version.

    Args:
        name: the adapter that answered.
        version: the version that answered (its full hash).
        good: whether the rating is good.
        now: when it was given.
    """
    rollout = records.find_open(session, name)
    if rollout is None or version not in (rollout.version, rollout.baseline):
        return
    minute = minute_of(time.time() if now is None else now)
    counts = _columns(TrafficCounts(good=int(good), bad=int(not good)))
    row = {"adapter": str(name), "version": version, "minute": minute, "gateway": ""} | counts
    insert = _dialect(session).insert(VersionTrafficRow).values(**row)
    added = {each: VersionTrafficRow.__table__.c[each] + insert.excluded[each] for each in ("good", "bad")}
    session.execute(insert.on_conflict_do_update(index_elements=_KEY, set_=added))


def measured(session: Session, rollout: RolloutRecord) -> RolloutState:
    """Returns a rollout with the traffic of its two versions.

    The new version's traffic counts from the start to the end of the rollout. So does that of the version it is
    compared with; in a watch, which takes all traffic from it, its traffic counts from one window before the start.
    """
    first, last = minute_of(rollout.started_at), rollout.ended_at
    before = first
    if rollout.kind is RolloutKind.WATCH:
        before = minute_of(rollout.started_at - rollout.policy.window_seconds)
    tried = _sum(session, rollout.adapter, rollout.version, first, last)
    compared = TrafficCounts()
    if rollout.baseline is not None:
        compared = _sum(session, rollout.adapter, rollout.baseline, before, last)
    return RolloutState(**rollout.model_dump(), tried=tried, compared=compared)


def has_before(session: Session, before: float) -> bool:
    """Returns whether `forget` would delete rows."""
    return session.scalar(select(VersionTrafficRow.minute).where(_old(before)).limit(1)) is not None


def forget(session: Session, before: float) -> int:
    """Deletes the rows of minutes before a time, except for adapters with an open rollout; returns their number."""
    statement = delete(VersionTrafficRow).where(_old(before))
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)  # type: ignore[attr-defined]  # results of these statements have it


def _old(before: float) -> ColumnElement[bool]:
    watched = select(RolloutRow.adapter).where(RolloutRow.open.is_(True))
    return (VersionTrafficRow.minute < int(before)) & VersionTrafficRow.adapter.not_in(watched)


def _sum(session: Session, adapter: str, version: str, first: int, last: float | None) -> TrafficCounts:
    rows = select(VersionTrafficRow).where(
        VersionTrafficRow.adapter == adapter, VersionTrafficRow.version == version, VersionTrafficRow.minute >= first
    )
    if last is not None:
        rows = rows.where(VersionTrafficRow.minute <= minute_of(last))
    found = (TrafficCounts.model_validate(row) for row in session.scalars(rows))
    return reduce(add, found, TrafficCounts())


def _columns(counts: TrafficCounts) -> dict[str, object]:
    histograms = {name: {str(key): value for key, value in getattr(counts, name).items()} for name in _HISTOGRAMS}
    return {name: getattr(counts, name) for name in _COUNTS} | histograms


def _dialect(session: Session):  # type: ignore[no-untyped-def]  # two modules with the same functions
    return postgresql if session.get_bind().dialect.name == "postgresql" else sqlite


_KEY = [column.name for column in VersionTrafficRow.__table__.primary_key]
