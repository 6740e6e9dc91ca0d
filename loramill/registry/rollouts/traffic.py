"""What the answers of versions were like, in rows of a period, version and gateway."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry.database.tables import RolloutRow, VersionTrafficRow
from loramill.registry.rollouts import records
from loramill.types import RolloutKind, RolloutRecord, RolloutState, TrafficCounts
from loramill.types.rollouts import bucket_seconds, median_bucket, total

#: Length of a period. A gateway keeps a day of them in memory, and a decision reads them all.
PERIOD_SECONDS = 600
#: How far a watch looks back: over a day, so that a version that is promoted at night is compared with daytime answers.
BASELINE_SECONDS = 86_400.0
#: Seconds for which rows are kept after their adapter's rollout has ended, so that it can be looked at.
KEPT_SECONDS = 7 * 86_400.0
#: Stands for all adapters together: where all are slower, a version is not the reason.
EVERYONE = ("", "")
_COUNTS = ("requests", "errors", "empty", "cut", "good", "bad")


@dataclass(frozen=True, slots=True, order=True)
class TrafficKey:
    """A version of an adapter in one period, which is given by its first second since the epoch."""

    adapter: str
    version: str
    period: int


def period_of(seconds: float) -> int:
    """Returns the first second of the period that contains a time."""
    return int(seconds // PERIOD_SECONDS) * PERIOD_SECONDS


def compared_versions(rollouts: Iterable[RolloutRecord]) -> set[tuple[str, str]]:
    """Returns the adapters and versions whose traffic is needed."""
    found = {
        (each.adapter, version) for each in rollouts for version in (each.version, each.baseline) if version is not None
    }
    return found | {EVERYONE} if found else found


def write(session: Session, gateway: str, counts: Mapping[TrafficKey, TrafficCounts]) -> None:
    """Writes a gateway's sums, in place of what it wrote for the same periods; adapters without a rollout are left out.

    Writing the same again changes nothing, so that a gateway repeats what may not have been written.
    """
    needed = compared_versions(records.list_open(session))
    rows = [
        {"adapter": key.adapter, "version": key.version, "period": key.period, "gateway": gateway}
        | _columns(counts[key])
        for key in sorted(counts)
        if (key.adapter, key.version) in needed
    ]
    if not rows:
        return
    insert = _dialect(session).insert(VersionTrafficRow)
    replaced = {name: insert.excluded[name] for name in (*_COUNTS, "total_histogram")}
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
    period = period_of(time.time() if now is None else now)
    counts = _columns(TrafficCounts(good=int(good), bad=int(not good)))
    row = {"adapter": str(name), "version": version, "period": period, "gateway": ""} | counts
    insert = _dialect(session).insert(VersionTrafficRow).values(**row)
    added = {each: VersionTrafficRow.__table__.c[each] + insert.excluded[each] for each in ("good", "bad")}
    session.execute(insert.on_conflict_do_update(index_elements=_KEY, set_=added))


def measured(session: Session, rollout: RolloutRecord) -> RolloutState:
    """Returns a rollout with the traffic of its two versions, see `measured_all`."""
    return measured_all(session, (rollout,))[0]


def measured_all(session: Session, rollouts: Sequence[RolloutRecord]) -> list[RolloutState]:
    """Returns rollouts with the traffic of their two versions, by one query.

    A new version's traffic counts from the start to the end of the rollout, in whole periods. So does that of the
    version it is compared with; in a watch, which takes all traffic from it, its traffic counts from a day before.
    """
    if not rollouts:
        return []
    names = {EVERYONE[0], *(each.adapter for each in rollouts)}
    earliest = period_of(min(each.started_at for each in rollouts) - BASELINE_SECONDS)
    rows = select(VersionTrafficRow).where(VersionTrafficRow.adapter.in_(names), VersionTrafficRow.period >= earliest)
    counts: dict[tuple[str, str], list[tuple[int, TrafficCounts]]] = {}
    for row in session.scalars(rows):
        counts.setdefault((row.adapter, row.version), []).append((row.period, TrafficCounts.model_validate(row)))

    @cache  # the rollouts of one run have the same periods of all adapters
    def sum_between(key: tuple[str, str], first: int, last: float) -> TrafficCounts:
        return total(each for period, each in counts.get(key, ()) if first <= period <= last)

    return [_state(each, sum_between) for each in rollouts]


def has_before(session: Session, before: float) -> bool:
    """Returns whether `forget` would delete rows."""
    return session.scalar(select(VersionTrafficRow.period).where(_old(before)).limit(1)) is not None


def forget(session: Session, before: float) -> int:
    """Deletes the rows of periods before a time, except for adapters with an open rollout; returns their number."""
    statement = delete(VersionTrafficRow).where(_old(before))
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)  # type: ignore[attr-defined]  # results of these statements have it


def _old(before: float) -> ColumnElement[bool]:
    watched = select(RolloutRow.adapter).where(RolloutRow.open.is_(True))
    return (VersionTrafficRow.period < int(before)) & VersionTrafficRow.adapter.not_in(watched)


def _state(rollout: RolloutRecord, sum_between: Callable[[tuple[str, str], int, float], TrafficCounts]) -> RolloutState:
    first, last = period_of(rollout.started_at), math.inf if rollout.ended_at is None else period_of(rollout.ended_at)
    watch = rollout.kind is RolloutKind.WATCH
    before = period_of(rollout.started_at - BASELINE_SECONDS) if watch else first
    tried = sum_between((rollout.adapter, rollout.version), first, last)
    compared = sum_between((rollout.adapter, rollout.baseline or ""), before, last)
    slowdown = 1.0
    if watch:
        others_before = _others(sum_between(EVERYONE, before, first - 1), compared)
        others_since = _others(sum_between(EVERYONE, first, last), tried)
        slowdown = _slowdown(others_before, others_since, rollout.policy.min_requests)
    return RolloutState(**rollout.model_dump(), tried=tried, compared=compared, slowdown=slowdown)


def _others(everyone: TrafficCounts, one: TrafficCounts) -> dict[int, int]:
    """The times per answer of all adapters but one."""
    own = one.total_histogram
    return {bucket: max(0, count - own.get(bucket, 0)) for bucket, count in everyone.total_histogram.items()}


def _slowdown(before: Mapping[int, int], since: Mapping[int, int], min_requests: int) -> float:
    old, new = median_bucket(before), median_bucket(since)
    if old is None or new is None or min(sum(before.values()), sum(since.values())) < min_requests:
        return 1.0
    return max(1.0, bucket_seconds(new) / bucket_seconds(old))


def _columns(counts: TrafficCounts) -> dict[str, object]:
    histogram = {str(bucket): count for bucket, count in counts.total_histogram.items()}
    return {name: getattr(counts, name) for name in _COUNTS} | {"total_histogram": histogram}


def _dialect(session: Session):  # type: ignore[no-untyped-def]  # two modules with the same functions
    return postgresql if session.get_bind().dialect.name == "postgresql" else sqlite


_KEY = [column.name for column in VersionTrafficRow.__table__.primary_key]
