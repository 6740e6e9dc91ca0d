"""Keeps a job's lease in a thread: heartbeats write the job's metrics and read requests to stop. No Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from loramill.errors import (
    DiskFull,
    JobCancelled,
    JobPaused,
    JobPreempted,
    LeaseLost,
    LoramillError,
    Unavailable,
)
from loramill.jobs.train.context import TrainingProgress
from loramill.registry import Registry, jobs
from loramill.retry import retry_while_unavailable
from loramill.settings import JobSettings
from loramill.types import JobRecord, PendingAction, SweepCandidate

log = logging.getLogger(__name__)

#: Seconds between heartbeats. A job learns of a request to stop within two heartbeats.
HEARTBEAT_SECONDS = 0.5
#: Seconds for which a worker keeps its job while the database is away: a failover or a restart takes minutes, and no
#: other worker can take the job meanwhile.
DATABASE_OUTAGE_SECONDS = 600.0
#: A job's history keeps at most about this many metrics events, whatever its number of steps.
MAX_METRICS_EVENTS = 200
#: Seconds over which a job's speed is averaged.
SPEED_WINDOW_SECONDS = 20.0

T = TypeVar("T")


def outlast_database_outage(write: Callable[[], T]) -> T:
    """Runs `write`, and repeats it for up to ten minutes while the database is away or its disk is full.

    Raises:
        Unavailable, DiskFull: the outage lasted longer.
    """
    return retry_while_unavailable(
        write,
        timeout_seconds=DATABASE_OUTAGE_SECONDS,
        pause_seconds=HEARTBEAT_SECONDS,
        errors=(Unavailable, DiskFull),
    )


class Lease:
    """Keeps a job's lease alive, and stops the training when its owner or a supervisor requests it.

    Training continues while the database is away: heartbeats and events are retried until it is back.
    """

    def __init__(self, registry: Registry, job: JobRecord, settings: JobSettings) -> None:
        self._registry, self._job, self._settings = registry, job, settings
        self._last: TrainingProgress | None = None
        self._valid_loss: float | None = None
        self._pending_events: list[tuple[TrainingProgress, int | None]] = []
        self._sweep: Sequence[SweepCandidate] | None = None
        self._speed: deque[tuple[float, int]] = deque()
        self._lock, self._heartbeat_lock = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._stop: LoramillError | None = None
        self._thread = threading.Thread(target=self._run_heartbeats, name=f"lease {job.id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def raise_if_stopped(self) -> None:
        """Raises why the job may not continue, if it may not.

        Raises:
            LeaseLost: another worker has the job.
            JobCancelled, JobPaused, JobPreempted: the job was requested to stop.
        """
        if self._stop is not None:
            raise self._stop

    def report(self, progress: TrainingProgress) -> None:
        """Takes the progress of a step; the next heartbeat writes it to the registry."""
        self.report_progress(progress)
        self.report_metrics(progress)

    def report_sweep(self, candidates: Sequence[SweepCandidate]) -> None:
        """Takes how far the candidates of a sweep are."""
        self._sweep = candidates

    def report_progress(self, progress: TrainingProgress) -> None:
        """Takes how far the job is, without the metrics of its step."""
        now = time.monotonic()
        with self._lock:
            self._last = progress
            self._valid_loss = self._valid_loss if progress.valid_loss is None else progress.valid_loss
            self._speed.append((now, progress.trained_tokens))
            while len(self._speed) > 2 and self._speed[0][0] < now - SPEED_WINDOW_SECONDS:
                self._speed.popleft()

    def report_metrics(self, progress: TrainingProgress, candidate: int | None = None) -> None:
        """Takes the metrics of a step for the job's history, unless there are too many.

        Args:
            candidate: number of the sweep's candidate that took the step.
        """
        interval = max(1, progress.total_steps // MAX_METRICS_EVENTS)
        due = progress.step % interval == 0 or progress.step == progress.total_steps
        if due or progress.valid_loss is not None:
            with self._lock:
                self._pending_events.append((progress, candidate))

    def flush(self) -> None:
        """Writes all progress reported so far.

        Raises:
            LeaseLost: another worker has the job.
            Unavailable, DiskFull: the registry can't be written.
        """
        outlast_database_outage(self._heartbeat)

    @property
    def last_progress(self) -> TrainingProgress | None:
        """Progress of the last step, or None before the first."""
        return self._last

    def _run_heartbeats(self) -> None:
        pause, failing = min(HEARTBEAT_SECONDS, self._settings.lease_seconds / 4), False
        while not self._ended.wait(pause):
            try:
                pending_action = self._heartbeat()
            except LeaseLost as error:
                self._stop = error
                return
            except Exception as error:  # of any kind: without heartbeats, the lease runs out while the job trains
                if not failing:
                    unexpected = not isinstance(error, LoramillError)
                    log.warning("job %s: heartbeats fail and are retried: %s", self._job.id, error, exc_info=unexpected)
                failing = True
                continue
            failing = False
            # Heartbeats continue while the job writes its last checkpoint.
            self._stop = _stop_error(self._job.id, pending_action)

    def _heartbeat(self) -> PendingAction | None:
        with self._heartbeat_lock:
            with self._lock:
                last, events, rate = self._last, tuple(self._pending_events), self._tokens_per_second()
            with self._registry.writing() as session:
                reported = jobs.JobProgress(
                    step=self._job.step if last is None else last.step,
                    trained_tokens=self._job.trained_tokens if last is None else last.trained_tokens,
                    loss=None if last is None else last.loss,
                    valid_loss=self._valid_loss,
                    tokens_per_second=rate,
                    sweep=self._sweep,
                )
                pending_action = jobs.heartbeat(
                    session,
                    self._job.id,
                    self._job.attempt,
                    reported,
                    now=time.time(),
                    seconds=self._settings.lease_seconds,
                )
                for progress, candidate in events:
                    message = f"Step {progress.step}/{progress.total_steps}: training loss={progress.loss:.3f}"
                    data: dict[str, float] = _event_data(progress, rate)
                    if candidate is not None:
                        message, data = f"Candidate {candidate}: {message}", {"candidate": candidate, **data}
                    jobs.add_event(session, self._job.id, message, kind="metrics", data=data)
            with self._lock:
                del self._pending_events[: len(events)]
            return pending_action

    def _tokens_per_second(self) -> float | None:
        if len(self._speed) < 2:
            return None
        (began, first), (now, last) = self._speed[0], self._speed[-1]
        return (last - first) / (now - began) if now > began else None


def _stop_error(job_id: str, pending_action: PendingAction | None) -> LoramillError | None:
    match pending_action:
        case "cancel":
            return JobCancelled(f"Job {job_id} was cancelled by its owner.")
        case "pause":
            return JobPaused(f"Job {job_id} was paused by its owner.")
        case "preempt":
            return JobPreempted(f"Job {job_id} was preempted by a job of a higher priority.")
    return None


def _event_data(progress: TrainingProgress, rate: float | None) -> dict[str, float]:
    data = progress.metrics | {
        "total_steps": progress.total_steps,
        "learning_rate": progress.learning_rate,
        "grad_norm": progress.grad_norm,
        "trained_tokens": progress.trained_tokens,
    }
    return data if rate is None else data | {"tokens_per_second": round(rate, 1)}
