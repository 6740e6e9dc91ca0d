"""Instants of cron expressions over changes to and from summer time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.pipelines.nightly.schedule.times import follows_clock, instants, next_time, passed_times

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",  # changes by 30 minutes
    "America/Havana",  # changes at midnight
    "Pacific/Apia",  # left out a day
    "Asia/Kathmandu",
)
CRONS = ("0 2 * * *", "30 2 * * *", "15,45 1-3 * * *", "0 0 * * *", "*/30 * * * *", "*/10 5 * * *", "10 * * * *",
         "30 1 * * 7", "0 2 1 * *", "5 0 29 2 *")  # fmt: skip
#: Days on which a clock of `ZONES` changes, and an ordinary one.
CHANGES = (
    datetime(2026, 3, 29, tzinfo=UTC),
    datetime(2026, 10, 25, tzinfo=UTC),
    datetime(2026, 3, 8, tzinfo=UTC),
    datetime(2026, 11, 1, tzinfo=UTC),
    datetime(2026, 4, 5, tzinfo=UTC),
    datetime(2026, 10, 4, tzinfo=UTC),
    datetime(2011, 12, 30, tzinfo=UTC),
    datetime(2026, 7, 1, tzinfo=UTC),
)


def all_times(cron: str, zone: str, after: datetime, until: datetime) -> list[datetime]:
    """Every instant, of all local times."""
    found: set[datetime] = set()
    local, end = (after - timedelta(days=2)).replace(tzinfo=None), (until + timedelta(days=2)).replace(tzinfo=None)
    for matched in CronSim(cron, local):
        if matched > end:
            break
        found |= set(instants(matched, ZoneInfo(zone), follows_clock(cron)))
    return sorted(each for each in found if after < each <= until)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize(
    ("cron", "zone", "day", "expected"),
    [
        # 02:00 to 03:00 is left out: the run is right after the change, once.
        ("30 2 * * *", "Europe/Berlin", "2026-03-29", ["2026-03-29T03:00+02:00"]),
        ("15,45 2 * * *", "Europe/Berlin", "2026-03-29", ["2026-03-29T03:00+02:00"]),
        # 02:00 to 03:00 is twice: the run is at the first.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25", ["2026-10-25T02:30+02:00"]),
        ("0 2 * * *", "America/New_York", "2026-03-08", ["2026-03-08T03:00-04:00"]),
        ("30 1 * * *", "America/New_York", "2026-11-01", ["2026-11-01T01:30-04:00"]),
        # Midnight is left out.
        ("0 0 * * *", "America/Havana", "2026-03-08", ["2026-03-08T01:00-04:00"]),
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-04", ["2026-10-04T02:30+11:00"]),
        ("*/10 5 * * *", "Australia/Lord_Howe", "2026-10-04", [f"2026-10-04T05:{m}0+11:00" for m in range(6)]),
        # Hourly: 23 and 25 runs.
        ("0 * * * *", "Europe/Berlin", "2026-03-29", 23),
        ("0 * * * *", "Europe/Berlin", "2026-10-25", 25),
        # A day without any hour: its run is at the begin of the next day.
        ("0 2 30 12 *", "Pacific/Apia", "2011-12-31", ["2011-12-31T00:00+14:00"]),
    ],
)
def test_a_day_with_a_change_has_its_runs(cron: str, zone: str, day: str, expected: list[str] | int) -> None:
    begin = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    end = (begin.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=ZoneInfo(zone))
    after, until = (each.astimezone(UTC) - timedelta(seconds=1) for each in (begin, end))
    found = all_times(cron, zone, after, until)
    if isinstance(expected, int):
        assert len(found) == expected
    else:
        assert found == [utc(each) for each in expected]
    assert passed_times(cron, zone, after, until, limit=100) == found[::-1]


@settings(deadline=None)
@given(
    st.sampled_from(CRONS),
    st.sampled_from(ZONES),
    st.sampled_from(CHANGES),
    st.integers(-72 * 60, 72 * 60),
    st.integers(1, 5),
)
def test_times_before_and_after_an_instant_agree_with_all_of_them(
    cron: str, zone: str, change: datetime, minutes: int, limit: int
) -> None:
    moment = change + timedelta(minutes=minutes)
    times = all_times(cron, zone, moment - timedelta(days=9), moment + timedelta(days=9))
    earlier = [each for each in reversed(times) if each <= moment]
    assert passed_times(cron, zone, moment - timedelta(days=9), moment, limit=limit) == earlier[:limit]
    later = [each for each in times if each > moment]
    assert not later or next_time(cron, zone, moment) == later[0]


def test_a_leap_day_is_found_and_a_span_without_one_has_none() -> None:
    assert next_time("0 0 29 2 *", "UTC", CHANGES[0]) == datetime(2028, 2, 29, tzinfo=UTC)
    assert passed_times("0 0 1 1 *", "UTC", CHANGES[0], CHANGES[1], limit=5) == []
