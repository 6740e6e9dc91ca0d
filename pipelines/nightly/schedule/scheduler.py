"""The loop that starts nightly runs at their times, one at a time, each in a process of its own.

Its state is in the registry: the scheduled times that have a run, and the lease of the process that works on one. So
several schedulers of one registry make one run of each time, and a scheduler that was killed continues where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from loramill.errors import LoramillError
from loramill.pipelines.nightly.definition import NightlyDefinition, ScheduleDefinition
from loramill.pipelines.nightly.definition.file import DefinitionFile
from loramill.pipelines.nightly.schedule.policy import DueDecision, decide_due
from loramill.pipelines.nightly.schedule.scheduled_run import ScheduledRun
from loramill.registry import Registry, nightly_schedule
from loramill.settings import Settings
from loramill.types import NightlyRun, ScheduledTime

#: Seconds between two looks at the clock.
INTERVAL_SECONDS = 10.0
#: Pause after a run was interrupted, for example since the gateway did not answer, before it is resumed.
RESUME_SECONDS = 300.0
log = logging.getLogger(__name__)


class RunProcess(Protocol):
    """A process that works on the open run."""

    def poll(self) -> int | None:
        """Returns its exit status, or None while it works."""

    def stop(self) -> None:
        """Ends it; the run stays open and is resumed later."""


class NightlyScheduler:
    """Starts runs at their times. `look` does what is due now; `run` calls it until it is stopped."""

    def __init__(
        self,
        registry: Registry,
        file: DefinitionFile,
        start: Callable[[NightlyDefinition], RunProcess],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry, self._file, self._start, self._clock = registry, file, start, clock
        self._process: RunProcess | None = None
        self._resume_after = 0.0
        self._logged = ""

    def run(self, stop: threading.Event) -> None:
        """Looks at the clock until `stop` is set; then ends the process of a run, which is resumed later."""
        while True:
            try:
                self.look()
            except LoramillError as error:  # such as an outage of the database
                self._log_once(f"the schedule of nightly runs waits: {error.message}")
            except Exception:  # a bug must not end the schedule
                log.exception("the schedule of nightly runs failed; it continues")
            if stop.wait(INTERVAL_SECONDS):
                break
        if self._process is not None:
            self._process.stop()

    def look(self) -> None:
        """Starts or resumes a run if one is due, or takes the end of one."""
        now = self._clock()
        definition = self._file.read()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            log.info("the process of the nightly run ended with status %d", status)
            self._process, self._resume_after = None, now + RESUME_SECONDS
        with self._registry.reading() as session:
            state = nightly_schedule.schedule_state(session, now)
        if state.resumable and now >= self._resume_after:
            self._start_process(definition, "it is resumed", state.last_run)
            return
        expression = expression_of(definition.schedule)
        if state.last_time is None or state.last_time.schedule != expression:
            if state.last_time is not None or expression:
                self._begin(expression, now)
            return
        since = max(state.last_time.scheduled_at, state.last_run.created_at if state.last_run else 0.0)
        decision = decide_due(definition.schedule, since, now)
        if not decision.due:
            if decision.scheduled_at is not None:
                self._log_once(f"nightly runs: {decision.reason}")
            return
        if state.last_run is not None and state.last_run.finished_at is None and _is_leased(state.last_run, now):
            self._log_once(f"nightly runs: {decision.reason}, after the run {state.last_run.id} that is at work")
            return
        self._claim(definition, decision, now)

    def _begin(self, expression: str, now: float) -> None:
        with self._registry.writing() as session:
            nightly_schedule.begin_schedule(session, expression, now)
        log.info("nightly runs: %s", f"the schedule is {expression}" if expression else "there is no schedule")

    def _claim(self, definition: NightlyDefinition, decision: DueDecision, now: float) -> None:
        assert decision.scheduled_at is not None
        expression = expression_of(definition.schedule)
        due = ScheduledTime(scheduled_at=decision.scheduled_at, schedule=expression, missed=decision.missed)
        with self._registry.writing() as session:
            run = nightly_schedule.claim_time(session, due, now)
        if run is None:
            log.info("nightly runs: another scheduler has started the run")
        else:
            self._start_process(definition, decision.reason, run)

    def _start_process(self, definition: NightlyDefinition, reason: str, run: NightlyRun | None) -> None:
        log.info("nightly run %s: %s", run and run.id, reason)
        self._process = self._start(definition)

    def _log_once(self, text: str) -> None:
        """Logs a text that each look repeats."""
        if text != self._logged:
            log.warning("%s", text)
        self._logged = text


def expression_of(schedule: ScheduleDefinition) -> str:
    """A schedule as it is recorded: cron expression and time zone; empty without one."""
    return f"{schedule.cron} {schedule.timezone}" if schedule.enabled else ""


def _is_leased(run: NightlyRun, now: float) -> bool:
    return run.lease_until is not None and run.lease_until >= now


def start_scheduler(settings: Settings) -> tuple[threading.Thread, threading.Event]:
    """Starts the loop in a thread; the event stops it, and the thread ends within seconds."""
    registry = Registry.open(settings.database, settings.artifacts)
    scheduler = NightlyScheduler(registry, DefinitionFile(settings), partial(ScheduledRun, settings))
    stop = threading.Event()
    thread = threading.Thread(target=scheduler.run, args=(stop,), name="nightly schedule", daemon=True)
    thread.start()
    return thread, stop
