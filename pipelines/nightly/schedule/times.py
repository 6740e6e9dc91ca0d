"""The instants that a cron expression means in a time zone, over changes to and from summer time.

cronsim matches local times; this module turns them into instants, by the rules of Debian's cron: where minute and hour
are fixed, a local time that a change leaves out is run right after the change, and one that occurs twice is run at its
first occurrence. Where minute or hour begins with a star, the expression follows the clock: what is left out is not
run, and what occurs twice is run twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim

#: The longest change of a zone's clock: Samoa left out December 30, 2011.
_LONGEST_CHANGE = timedelta(hours=25)
_MINUTE = timedelta(minutes=1)


def passed_times(cron: str, timezone: str, after: datetime, until: datetime, *, limit: int) -> list[datetime]:
    """Returns the instants after one and at or before another, newest first, in UTC; at most the newest `limit`."""
    zone, clock = ZoneInfo(timezone), follows_clock(cron)
    start, end = _local(until, zone) + _LONGEST_CHANGE, _local(after, zone) - _LONGEST_CHANGE
    found: set[datetime] = set()
    for local in CronSim(cron, start, reverse=True):
        if local < end:
            break
        found |= {each for each in instants(local, zone, clock) if after < each <= until}
        if len(found) == limit:  # what the order of local times hides is at most this much older
            end = max(end, local - _LONGEST_CHANGE)
    return sorted(found, reverse=True)[:limit]


def next_time(cron: str, timezone: str, after: datetime) -> datetime | None:
    """Returns the first instant after another one, in UTC; None if the expression matches no date in 50 years."""
    zone, clock = ZoneInfo(timezone), follows_clock(cron)
    found: list[datetime] = []
    end: datetime | None = None
    for local in CronSim(cron, _local(after, zone) - _LONGEST_CHANGE):
        if end is not None and local > end:
            break
        found += [each for each in instants(local, zone, clock) if each > after]
        if found and end is None:
            end = local + _LONGEST_CHANGE
    return min(found, default=None)


def follows_clock(cron: str) -> bool:
    """Whether minute or hour begins with a star, so that the expression means a frequency, not times of a day."""
    minute, hour = cron.split()[:2]
    return minute.startswith("*") or hour.startswith("*")


def instants(local: datetime, zone: ZoneInfo, clock: bool) -> Iterator[datetime]:
    """Yields the instants in UTC that a local time means.

    Args:
        local: without a zone.
        zone: its zone.
        clock: whether the expression follows the clock.
    """
    if _is_left_out(local, zone):
        if clock:
            return
        while _is_left_out(local, zone):
            local += _MINUTE
    first, second = (local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    yield first
    if clock and second != first:
        yield second


def _is_left_out(local: datetime, zone: ZoneInfo) -> bool:
    return _local(local.replace(tzinfo=zone).astimezone(UTC), zone) != local


def _local(instant: datetime, zone: ZoneInfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)
