"""A lease in a thread of its own: heartbeats with the job's figures, and what the job is asked to do. No Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
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
from loramill.jobs.train.loop import TrainingProgress
from loramill.registry import Registry, jobs
from loramill.settings import JobSettings
from loramill.types import JobRecord, PendingAction

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between heartbeats, so that a job that is asked to stop knows it within two.
HEARTBEAT_SECONDS = 0.5
#: Seconds for which a worker keeps its job while the database is away: a failover or a restart takes minutes, and no
#: other worker can take the job meanwhile.
DATABASE_OUTAGE_SECONDS = 600.0
#: A job's history keeps at most about this many metrics events, whatever its number of steps.
MAX_METRICS_EVENTS = 200
#: Seconds over which a job's speed is taken.
SPEED_WINDOW_SECONDS = 20.0


def retry_while_unavailable(timeout_seconds: float, operation: Callable[[], T]) -> T:
    """What `act` returns, tried again for so many seconds while the database is away or its disk full.

    A commit whose answer was lost may have gone through: `act` must be harmless twice.

    Raises:
        Unavailable, DiskFull: it was so for longer.
    """
    deadline, logged = time.monotonic() + timeout_seconds, False
    while True:
        try:
            return operation()
        except (Unavailable, DiskFull) as error:
            if time.monotonic() > deadline:
                raise
            if not logged:
                log.warning("trying again, for up to %.0f s: %s", timeout_seconds, error.message)
            logged = True
            time.sleep(HEARTBEAT_SECONDS)


class Lease:
    """Keeps a job's lease alive, and tells the training when it is asked to stop.

    A database that is away doesn't end the training: heartbeats and events are tried again until it is back.
    """

    def __init__(self, registry: Registry, job: JobRecord, settings: JobSettings) -> None:
        self._registry, self._job, self._settings = registry, job, settings
        self._last: TrainingProgress | None = None
        self._valid_loss: float | None = None
        self._pending_events: list[TrainingProgress] = []
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
        """Lets a job that may go on go on.

        Raises:
            LeaseLost, JobCancelled, JobPaused, JobPreempted: it may not.
        """
        if self._stop is not None:
            raise self._stop

    def report(self, point: TrainingProgress) -> None:
        """Notes how far the job is; the next heartbeat records it."""
        now = time.monotonic()
        with self._lock:
            self._last = point
            self._valid_loss = self._valid_loss if point.valid_loss is None else point.valid_loss
            self._speed.append((now, point.trained_tokens))
            while len(self._speed) > 2 and self._speed[0][0] < now - SPEED_WINDOW_SECONDS:
                self._speed.popleft()
            every = max(1, point.total_steps // MAX_METRICS_EVENTS)
            if point.step % every == 0 or point.step == point.total_steps or point.valid_loss is not None:
                self._pending_events.append(point)

    def flush(self) -> None:
        """Records what was noted so far.

        Raises:
            LeaseLost: the job is another worker's.
            Unavailable, DiskFull: the record can't be written.
        """
        retry_while_unavailable(DATABASE_OUTAGE_SECONDS, self._heartbeat)

    @property
    def last_progress(self) -> TrainingProgress | None:
        """The last point noted; None: no step was taken."""
        return self._last

    def _run_heartbeats(self) -> None:
        pause, away = min(HEARTBEAT_SECONDS, self._settings.lease_seconds / 4), False
        while not self._ended.wait(pause):
            try:
                asked = self._heartbeat()
            except LeaseLost as error:
                self._stop = error
                return
            except LoramillError as error:
                if not away:
                    log.warning("job %s: its heartbeat did not reach the database: %s", self._job.id, error.message)
                away = True
                continue
            away = False
            # Beating goes on while the job writes its checkpoint.
            self._stop = _stop_error(self._job.id, asked)

    def _heartbeat(self) -> PendingAction | None:
        with self._heartbeat_lock:
            with self._lock:
                last, events, rate = self._last, tuple(self._pending_events), self._tokens_per_second()
            with self._registry.writing() as session:
                asked = jobs.heartbeat(
                    session,
                    self._job.id,
                    self._job.attempt,
                    now=time.time(),
                    seconds=self._settings.lease_seconds,
                    step=self._job.step if last is None else last.step,
                    trained_tokens=self._job.trained_tokens if last is None else last.trained_tokens,
                    loss=None if last is None else last.loss,
                    valid_loss=self._valid_loss,
                    tokens_per_second=rate,
                )
                for point in events:
                    message = f"Step {point.step}/{point.total_steps}: training loss={point.loss:.3f}"
                    jobs.add_event(session, self._job.id, "info", "metrics", message, _event_data(point, rate))
            with self._lock:
                del self._pending_events[: len(events)]
            return asked

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
            return JobPreempted(f"Job {job_id} makes room for one of a higher priority.")
    return None


def _event_data(point: TrainingProgress, rate: float | None) -> dict[str, float]:
    figures = point.metrics | {
        "total_steps": point.total_steps,
        "learning_rate": point.learning_rate,
        "grad_norm": point.grad_norm,
        "trained_tokens": point.trained_tokens,
    }
    return figures if rate is None else figures | {"tokens_per_second": round(rate, 1)}
