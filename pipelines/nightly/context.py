"""What the stages of a nightly run share: the run's recorded steps, and how a failure is recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from loramill.errors import (
    DeadlineExceeded,
    LeaseLost,
    LoramillError,
    NotFound,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    SetupError,
    Unavailable,
)
from loramill.models.catalog import Base
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.gateway import EvalGateway
from loramill.pipelines.nightly.schedule.lease import LEASE_SECONDS
from loramill.registry import Registry, adapters, nightly, nightly_schedule
from loramill.settings import Settings
from loramill.types import NightlyRun, NightlyStep, StepStatus

STAGES = ("collect", "train", "evaluate", "gate", "promote")
#: Failures that pass by themselves: the next run tries again with the same data.
TRANSIENT_ERRORS = (Unavailable, DeadlineExceeded, Overloaded, QuotaExceeded, RateLimited, SetupError, OSError)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NightlyProgress:
    """The progress of a stage: steps of an adapter's job, or answers to the questions of all adapters (None)."""

    stage: str
    adapter: str | None
    done: int
    total: int
    state: str


Report = Callable[[NightlyStep], None]
OnProgress = Callable[[NightlyProgress], None]


@dataclass(frozen=True, slots=True)
class NightlyContext:
    """One nightly run, with what its stages need; `holder` is the process that has leased it, if one has."""

    run: NightlyRun
    registry: Registry
    settings: Settings
    base: Base
    report: Report
    gateway: EvalGateway
    progress: OnProgress = lambda progress: None
    definition: NightlyDefinition = field(default_factory=NightlyDefinition)
    holder: str | None = None

    def done(self, stage: str) -> dict[str, dict[str, Any]]:
        """Results of the adapters that finished a stage."""
        return {step.adapter: step.result for step in self.steps(stage) if step.status is StepStatus.DONE}

    def result(self, adapter: str, stage: str) -> dict[str, Any] | None:
        """The result of a stage that an adapter finished, else None.

        It reads one row: a stage that reads those of all adapters for each of them takes minutes for thousands.
        """
        with self.registry.reading() as session:
            steps = nightly.list_steps(session, self.run.id, stage=stage, adapter=adapter)
        return next((step.result for step in steps if step.status is StepStatus.DONE), None)

    def finished(self, adapter: str, stage: str) -> dict[str, Any]:
        """The result of a stage that an adapter has finished.

        Raises:
            NotFound: it has not finished it.
        """
        result = self.result(adapter, stage)
        if result is None:
            raise NotFound(f"{adapter} has not finished the stage '{stage}' of {self.run.id}.")
        return result

    def remaining(self, stage: str) -> list[str]:
        """Adapters that finished the previous stage and have neither finished this one nor failed in it."""
        previous = STAGES[STAGES.index(stage) - 1]
        ended = {step.adapter for step in self.steps(stage) if step.status is not StepStatus.PENDING}
        return [adapter for adapter in self.done(previous) if adapter not in ended]

    def in_progress(self, stage: str) -> dict[str, dict[str, Any]]:
        """Recorded results of adapters that have not ended a stage yet."""
        return {step.adapter: step.result for step in self.steps(stage) if step.status is StepStatus.PENDING}

    def steps(self, stage: str | None = None) -> list[NightlyStep]:
        """The recorded steps of a stage, or of all stages."""
        with self.registry.reading() as session:
            return nightly.list_steps(session, self.run.id, stage=stage)

    def record_pending(self, session: Session, adapter: str, stage: str, result: dict[str, Any]) -> NightlyStep:
        """Records the state of a step that has not ended."""
        self.check_lease(session)
        return nightly.record_step(session, self.run.id, adapter, stage, StepStatus.PENDING, result)

    def finish(self, session: Session, adapter: str, stage: str, result: dict[str, Any]) -> None:
        """Records the end of a step in the transaction of its work, and reports it."""
        self.check_lease(session)
        self.report(nightly.record_step(session, self.run.id, adapter, stage, StepStatus.DONE, result))

    def attempt(self, adapter: str, stage: str, work: Callable[[], None]) -> bool:
        """Does a step's work; a failure is recorded, and affects no other adapter. Returns whether it succeeded."""
        try:
            work()
        except LeaseLost:
            raise
        except LoramillError as error:
            self.fail(adapter, stage, error)
        except Exception as error:  # a bug that one adapter's data triggers must not stop the others
            log.exception("%s of %s failed", stage, adapter)
            self.fail(adapter, stage, error)
        else:
            return True
        return False

    def fail(self, adapter: str, stage: str, error: Exception) -> None:
        """Records why a step failed, and releases the adapter's data or sets it aside."""
        message = error.message if isinstance(error, LoramillError) else f"{type(error).__name__}: {error}"
        transient = isinstance(error, TRANSIENT_ERRORS)
        with self.registry.writing() as session:
            self.check_lease(session)
            if not adapter_exists(session, adapter):
                return  # `deleted_adapters` reports it at the end of the run
            if transient:
                nightly.release(session, self.run.id, adapter)
            elif stage == "collect":  # its own transaction was rolled back
                nightly.collect(session, self.run.id, adapter)
            recorded = nightly.list_steps(session, self.run.id, stage=stage, adapter=adapter)
            result = (recorded[0].result if recorded else {}) | {
                "error": message,
                "data": "waiting" if transient else "set aside",
            }
            self.report(nightly.record_step(session, self.run.id, adapter, stage, StepStatus.FAILED, result))

    def check_lease(self, session: Session) -> None:
        """Checks that the run is still this process's, and extends its lease; nothing without a `holder`.

        Steps that follow each other closely leave no gap on SQLite for the thread that extends the lease: on a busy
        machine it waited for four minutes while data was collected.

        Raises:
            LeaseLost: another process has taken it over.
        """
        if self.holder is not None:
            now = time.time()
            nightly_schedule.extend_lease(session, self.run.id, self.holder, now=now, seconds=LEASE_SECONDS)

    def interrupt(self, error: LoramillError) -> None:
        """Records why the run stopped, for every adapter that has not ended; the next run resumes it."""
        steps = self.steps()
        ended = {step.adapter for step in steps if step.step == STAGES[-1] or step.status is StepStatus.FAILED}
        done = {(step.adapter, step.step) for step in steps if step.status is StepStatus.DONE}
        for adapter in self.done("collect").keys() - ended:
            stage = next(stage for stage in STAGES if (adapter, stage) not in done)
            recorded = self.in_progress(stage).get(adapter, {})
            with self.registry.writing() as session:
                self.record_pending(session, adapter, stage, recorded | {"error": error.message})


def adapter_exists(session: Session, adapter: str) -> bool:
    """Whether there is an adapter of this name."""
    try:
        adapters.get(session, adapter)
    except NotFound:
        return False
    return True
