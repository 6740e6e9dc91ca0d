"""When a nightly run is due, driven by a fake clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.pipelines.nightly.definition import ScheduleDefinition
from loramill.pipelines.nightly.schedule.policy import LATE_SECONDS, MAX_COUNTED, decide_due

from .test_times import CHANGES, CRONS, ZONES, all_times

DAY = 86_400.0


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_a_run_is_due_from_its_time_until_it_began() -> None:
    schedule = ScheduleDefinition(timezone="Europe/Berlin")
    before = decide_due(schedule, at("2026-06-01T02:00+02:00"), at("2026-06-02T01:59:59+02:00"))
    assert (before.due, before.scheduled_at, before.next_at) == (False, None, at("2026-06-02T02:00+02:00"))
    assert before.reason == "no scheduled time has passed; it is at 2026-06-02 02:00 CEST"
    now = at("2026-06-02T02:00+02:00")
    due = decide_due(schedule, at("2026-06-01T02:00+02:00"), now)
    assert (due.due, due.scheduled_at, due.missed) == (True, now, 0)
    assert due.reason == "the run of 2026-06-02 02:00 CEST is due"
    assert not decide_due(schedule, now, now).due


def test_a_run_by_hand_after_the_time_stands_for_it() -> None:
    assert not decide_due(ScheduleDefinition(), at("2026-06-02T02:10Z"), at("2026-06-02T09:00Z")).due


def test_missed_times_are_caught_up_once() -> None:
    late = decide_due(ScheduleDefinition(), at("2026-06-01T02:00Z"), at("2026-06-05T12:00Z"))
    assert (late.due, late.scheduled_at, late.missed) == (True, at("2026-06-05T02:00Z"), 3)
    assert late.reason == "4 scheduled times had no run, the last at 2026-06-05 02:00 UTC; one run catches up"


def test_missed_times_are_skipped_until_the_next() -> None:
    schedule = ScheduleDefinition(missed="skip")
    late = decide_due(schedule, at("2026-06-01T02:00Z"), at("2026-06-05T12:00Z"))
    assert not late.due and late.reason.endswith("the last at 2026-06-05 02:00 UTC; it is skipped")
    on_time = decide_due(schedule, at("2026-06-01T02:00Z"), at("2026-06-06T02:00Z") + LATE_SECONDS)
    assert (on_time.due, on_time.missed) == (True, 4) and "4 scheduled times before" in on_time.reason
    assert not decide_due(schedule, at("2026-06-01T02:00Z"), at("2026-06-06T02:00Z") + LATE_SECONDS + 1).due


def test_a_disabled_schedule_is_never_due() -> None:
    found = decide_due(ScheduleDefinition(enabled=False), 0, at("2026-06-05T12:00Z"))
    assert (found.due, found.next_at) == (False, None)


def test_a_year_of_missed_minutes_is_one_run() -> None:
    found = decide_due(ScheduleDefinition(cron="* * * * *"), at("2025-06-01T00:00Z"), at("2026-06-01T00:00Z"))
    assert found.due and found.missed == MAX_COUNTED


@pytest.mark.parametrize("missed", ["once", "skip"])
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_each_scheduled_time_runs_exactly_once_in_order(missed: str, data: st.DataObject) -> None:
    """A scheduler that looks at random moments, sometimes not for days, over days on which clocks change."""
    cron, zone = data.draw(st.sampled_from(CRONS)), data.draw(st.sampled_from(ZONES))
    change = data.draw(st.sampled_from(CHANGES))
    schedule = ScheduleDefinition(cron=cron, timezone=zone, missed=missed)
    begin = (change - timedelta(days=2)).timestamp()
    now = since = begin
    ran: list[float] = []
    looked = [begin]
    for pause in data.draw(st.lists(st.floats(1, 240) | st.floats(60, DAY), min_size=1, max_size=15)):
        now += pause
        looked.append(now)
        found = decide_due(schedule, since, now)
        if found.due:
            assert found.scheduled_at is not None and since < found.scheduled_at <= now
            ran.append(found.scheduled_at)
            since = found.scheduled_at
        assert found.next_at is None or found.next_at > now
    assert ran == sorted(set(ran))
    times = [
        each.timestamp()
        for each in all_times(cron, zone, datetime.fromtimestamp(begin, UTC), datetime.fromtimestamp(now, UTC))
    ]
    # Of the times between two looks, the newest has a run: always, or if it is not too late.
    expected = []
    for earlier, later in pairwise(looked):
        newest = [each for each in times if earlier < each <= later][-1:]
        expected += [each for each in newest if missed == "once" or later - each <= LATE_SECONDS]
    assert ran == expected


@settings(deadline=None, max_examples=5)
@given(st.sampled_from(CRONS), st.sampled_from(ZONES), st.sampled_from(CHANGES), st.integers(0, 59))
def test_a_scheduler_that_always_looks_misses_nothing(cron: str, zone: str, change: datetime, offset: int) -> None:
    schedule = ScheduleDefinition(cron=cron, timezone=zone, missed="skip")
    begin = (change - timedelta(hours=12)).timestamp()
    since, ran = begin, []
    for now in range(int(begin) + offset, int(begin) + 36 * 3600, 300):
        found = decide_due(schedule, since, now)
        if found.due and found.scheduled_at is not None:
            assert found.missed == 0
            ran.append(found.scheduled_at)
            since = found.scheduled_at
    span = (datetime.fromtimestamp(begin, UTC), datetime.fromtimestamp(now, UTC))
    assert ran == [each.timestamp() for each in all_times(cron, zone, *span)]
