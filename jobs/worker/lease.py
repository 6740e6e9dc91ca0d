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
from loramill.jobs.train.loop import Progress
from loramill.registry import Registry, jobs
from loramill.settings import JobSettings
from loramill.types import Asked, JobRecord

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between heartbeats, so that a job that is asked to stop knows it within two.
BEAT_SECONDS = 0.5
#: Seconds for which a worker keeps its job while the database is away: a failover or a restart takes minutes, and no
#: other worker can take the job meanwhile.
PATIENCE_SECONDS = 600.0
#: A job's history keeps at most about this many metrics events, whatever its number of steps.
METRICS_EVENTS = 200
#: Seconds over which a job's speed is taken.
SPEED_SECONDS = 20.0


def insist(seconds: float, act: Callable[[], T]) -> T:
    """What `act` returns, tried again for so many seconds while the database is away or its disk full.

    A commit whose answer was lost may have gone through: `act` must be harmless twice.

    Raises:
        Unavailable, DiskFull: it was so for longer.
    """
    deadline, logged = time.monotonic() + seconds, False
    while True:
        try:
            return act()
        except (Unavailable, DiskFull) as error:
            if time.monotonic() > deadline:
                raise
            if not logged:
                log.warning("trying again, for up to %.0f s: %s", seconds, error.message)
            logged = True
            time.sleep(BEAT_SECONDS)


class Lease:
    """Keeps a job's lease alive, and tells the training when it is asked to stop.

    A database that is away doesn't end the training: heartbeats and events are tried again until it is back.
    """

    def __init__(self, registry: Registry, job: JobRecord, settings: JobSettings) -> None:
        self._registry, self._job, self._settings = registry, job, settings
        self._last: Progress | None = None
        self._valid_loss: float | None = None
        self._unwritten: list[Progress] = []
        self._speed: deque[tuple[float, int]] = deque()
        self._noting, self._beating = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._stop: LoramillError | None = None
        self._thread = threading.Thread(target=self._beat_until_end, name=f"lease {job.id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Lets a job that may go on go on.

        Raises:
            LeaseLost, JobCancelled, JobPaused, JobPreempted: it may not.
        """
        if self._stop is not None:
            raise self._stop

    def progress(self, point: Progress) -> None:
        """Notes how far the job is; the next heartbeat records it."""
        now = time.monotonic()
        with self._noting:
            self._last = point
            self._valid_loss = self._valid_loss if point.valid_loss is None else point.valid_loss
            self._speed.append((now, point.tokens))
            while len(self._speed) > 2 and self._speed[0][0] < now - SPEED_SECONDS:
                self._speed.popleft()
            every = max(1, point.steps // METRICS_EVENTS)
            if point.step % every == 0 or point.step == point.steps or point.valid_loss is not None:
                self._unwritten.append(point)

    def flush(self) -> None:
        """Records what was noted so far.

        Raises:
            LeaseLost: the job is another worker's.
            Unavailable, DiskFull: the record can't be written.
        """
        insist(PATIENCE_SECONDS, self._beat)

    @property
    def last(self) -> Progress | None:
        """The last point noted; None: no step was taken."""
        return self._last

    def _beat_until_end(self) -> None:
        pause, away = min(BEAT_SECONDS, self._settings.lease_seconds / 4), False
        while not self._ended.wait(pause):
            try:
                asked = self._beat()
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
            self._stop = _stop(self._job.id, asked)

    def _beat(self) -> Asked | None:
        with self._beating:
            with self._noting:
                last, events, rate = self._last, tuple(self._unwritten), self._tokens_per_second()
            with self._registry.writing() as session:
                asked = jobs.heartbeat(
                    session,
                    self._job.id,
                    self._job.attempt,
                    now=time.time(),
                    seconds=self._settings.lease_seconds,
                    step=self._job.step if last is None else last.step,
                    trained_tokens=self._job.trained_tokens if last is None else last.tokens,
                    loss=None if last is None else last.loss,
                    valid_loss=self._valid_loss,
                    tokens_per_second=rate,
                )
                for point in events:
                    message = f"Step {point.step}/{point.steps}: training loss={point.loss:.3f}"
                    jobs.add_event(session, self._job.id, "info", "metrics", message, _figures(point, rate))
            with self._noting:
                del self._unwritten[: len(events)]
            return asked

    def _tokens_per_second(self) -> float | None:
        if len(self._speed) < 2:
            return None
        (began, first), (now, last) = self._speed[0], self._speed[-1]
        return (last - first) / (now - began) if now > began else None


def _stop(job_id: str, asked: Asked | None) -> LoramillError | None:
    match asked:
        case "cancel":
            return JobCancelled(f"Job {job_id} was cancelled by its owner.")
        case "pause":
            return JobPaused(f"Job {job_id} was paused by its owner.")
        case "preempt":
            return JobPreempted(f"Job {job_id} makes room for one of a higher priority.")
    return None


def _figures(point: Progress, rate: float | None) -> dict[str, float]:
    figures = point.metrics | {
        "total_steps": point.steps,
        "learning_rate": point.learning_rate,
        "grad_norm": point.grad_norm,
        "trained_tokens": point.tokens,
    }
    return figures if rate is None else figures | {"tokens_per_second": round(rate, 1)}
