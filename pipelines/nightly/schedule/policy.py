"""When a nightly run is due. A pure function of the schedule, the last run and the clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from loramill.pipelines.nightly.definition import ScheduleDefinition
from loramill.pipelines.nightly.schedule.times import next_time, passed_times
from loramill.plural import counted

#: A run that starts up to this long after its time has not missed it: a restart of `loramill up` takes a minute.
LATE_SECONDS = 300.0
#: Missed times are counted up to this number.
MAX_COUNTED = 30


@dataclass(frozen=True, slots=True)
class DueDecision:
    """Whether a run is due.

    Attributes:
        due: whether a run has to start now.
        scheduled_at: the newest scheduled time without a run, in seconds since the epoch; None if there is none.
        missed: number of scheduled times before that one without a run, at most `MAX_COUNTED`.
        next_at: the next scheduled time, in seconds since the epoch; None if there is none in 50 years.
        reason: one sentence.
    """

    due: bool
    scheduled_at: float | None
    missed: int
    next_at: float | None
    reason: str


def decide_due(schedule: ScheduleDefinition, since: float, now: float) -> DueDecision:
    """Decides whether a run is due: whether a scheduled time has passed since the last run began.

    Args:
        schedule: the schedule.
        since: the latest of the last scheduled time that had a run, the begin of the last run, and the begin of the
            schedule, in seconds since the epoch. A run that began by hand after a scheduled time stands for it.
        now: in seconds since the epoch.
    """
    if not schedule.enabled:
        return DueDecision(False, None, 0, None, "the schedule is not enabled")
    moment = datetime.fromtimestamp(now, UTC)
    began = datetime.fromtimestamp(since, UTC)
    times = passed_times(schedule.cron, schedule.timezone, began, moment, limit=MAX_COUNTED + 1)
    passed = [each.timestamp() for each in times]
    coming = next_time(schedule.cron, schedule.timezone, moment)
    next_at = coming.timestamp() if coming else None
    if not passed:
        when = "there is none in 50 years" if next_at is None else f"it is at {shown(next_at, schedule.timezone)}"
        return DueDecision(False, None, 0, next_at, f"no scheduled time has passed; {when}")
    newest, missed = passed[0], len(passed) - 1
    at = shown(newest, schedule.timezone)
    if now - newest <= LATE_SECONDS:
        also = f"; it also stands for {_number(missed)} before, which had none" if missed else ""
        return DueDecision(True, newest, missed, next_at, f"the run of {at} is due{also}")
    number = _number(missed + 1)
    if schedule.missed == "skip":
        return DueDecision(False, newest, missed, next_at, f"{number} had no run, the last at {at}; it is skipped")
    return DueDecision(True, newest, missed, next_at, f"{number} had no run, the last at {at}; one run catches up")


def shown(seconds: float, timezone: str) -> str:
    """A time in a zone, with its zone: "2026-03-29 03:00 CEST"."""
    return f"{datetime.fromtimestamp(seconds, ZoneInfo(timezone)):%Y-%m-%d %H:%M %Z}"


def _number(count: int) -> str:
    return f"{MAX_COUNTED} or more scheduled times" if count > MAX_COUNTED else counted(count, "scheduled time")
