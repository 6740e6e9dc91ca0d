"""What a person wants to know of the schedule: its definition, its next times, and the run that is at work."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime

from pydantic import Field

from loramill.errors import DefinitionInvalid
from loramill.pipelines.nightly.definition import NO_FILE, ScheduleDefinition, load_definition
from loramill.pipelines.nightly.outcome import outcomes, summary
from loramill.pipelines.nightly.rollouts.overview import RolloutOverview, rollouts_around
from loramill.pipelines.nightly.schedule.lease import LEASE_SECONDS, is_dead
from loramill.pipelines.nightly.schedule.policy import decide_due, shown
from loramill.pipelines.nightly.schedule.times import next_time
from loramill.registry import Registry, nightly, nightly_approvals, nightly_schedule
from loramill.settings import Settings
from loramill.types import Approval, FrozenModel, NightlyRun, StepStatus


class RunOverview(FrozenModel):
    """A run in a few words."""

    id: str = Field(description="ID of the run.")
    began_at: float = Field(description="When it began, in seconds since the epoch.")
    finished_at: float | None = Field(description="When it ended. Null while it is open.")
    scheduled_at: tuple[float, ...] = Field(description="The scheduled times that it stands for; none: begun by hand.")
    state: str = Field(description="finished, running, or interrupted.")
    holder: str | None = Field(description="The process that works on it, or the last one that did.")
    silent_seconds: float | None = Field(description="Seconds since that process extended its lease.")
    stages: dict[str, int] = Field(description="Number of adapters that finished each stage.")
    summary: str = Field(description="How it ended for its adapters.")


class ScheduleOverview(FrozenModel):
    """The schedule and the newest run."""

    file: str = Field(description="The file that defines nightly runs.")
    exists: bool = Field(description="Whether it exists.")
    problems: tuple[str, ...] = Field(description="Its faults; until they are corrected, its last good state applies.")
    schedule: str = Field(description="Cron expression and time zone. Empty: none, or the file has faults.")
    next_times: tuple[str, ...] = Field(description="The next scheduled times.")
    due: str = Field(description="Whether a run is due, and why.")
    run: RunOverview | None = Field(description="The newest run.")
    rollouts: tuple[RolloutOverview, ...] = Field(
        description="Rollouts that are under way, or ended since the run before the newest one."
    )
    approvals: tuple[Approval, ...] = Field(description="Challengers of all runs that wait for approval.")


def schedule_overview(registry: Registry, settings: Settings, now: float | None = None) -> ScheduleOverview:
    """Returns the state of the schedule, with the newest run."""
    now = time.time() if now is None else now
    problems: tuple[str, ...] = ()
    definition = NO_FILE
    try:
        definition = load_definition(settings)
    except DefinitionInvalid as error:
        problems = error.problems or (error.message,)
    schedule = definition.schedule
    with registry.reading() as session:
        state = nightly_schedule.schedule_state(session, now)
        run = state.last_run
        waiting = nightly_approvals.list_waiting(session)
        latest = None if run is None else run.model_copy(update={"finished_at": None})
        rollouts = rollouts_around(session, latest, now)
    last = state.last_time
    since = max(last.scheduled_at if last else now, run.created_at if run else 0.0)
    return ScheduleOverview(
        file=str(settings.nightly_file),
        exists=settings.nightly_file.exists(),
        problems=problems,
        schedule=f"{schedule.cron} {schedule.timezone}" if schedule.enabled else "",
        next_times=tuple(coming_times(schedule, now)),
        due=decide_due(schedule, since, now).reason,
        run=None if run is None else run_overview(registry, run, now),
        rollouts=tuple(rollouts),
        approvals=tuple(waiting),
    )


def coming_times(schedule: ScheduleDefinition, now: float, count: int = 3) -> list[str]:
    """Returns the next scheduled times as texts in the schedule's zone."""
    found: list[str] = []
    moment: datetime | None = datetime.fromtimestamp(now, UTC)
    while schedule.enabled and len(found) < count and moment is not None:
        moment = next_time(schedule.cron, schedule.timezone, moment)
        found += [] if moment is None else [shown(moment.timestamp(), schedule.timezone)]
    return found


def run_overview(registry: Registry, run: NightlyRun, now: float) -> RunOverview:
    """Returns a run in a few words."""
    with registry.reading() as session:
        steps = nightly.list_steps(session, run.id)
        times = nightly_schedule.list_times(session, run.id)
    leased = run.lease_until is not None and run.lease_until >= now and not is_dead(run.holder or "")
    return RunOverview(
        id=run.id,
        began_at=run.created_at,
        finished_at=run.finished_at,
        scheduled_at=tuple(each.scheduled_at for each in times),
        state="finished" if run.finished_at is not None else "running" if leased else "interrupted",
        holder=run.holder,
        silent_seconds=now - (run.lease_until - LEASE_SECONDS) if run.lease_until is not None else None,
        stages=dict(Counter(step.step for step in steps if step.status is StepStatus.DONE)),
        summary=summary(outcomes(steps)),
    )


def list_overviews(registry: Registry, limit: int) -> list[RunOverview]:
    """Returns the last runs in a few words, newest first."""
    with registry.reading() as session:
        runs = nightly.list_runs(session, limit)
    now = time.time()
    return [run_overview(registry, run, now) for run in runs]
