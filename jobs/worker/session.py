"""A session is a worker that leases several jobs and trains them by shared passes over one base. No Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from loramill.errors import LoramillError, Unavailable
from loramill.jobs.train.engine import Driver, Ended, TrainingEngine, Work
from loramill.jobs.train.forward import configured_forward
from loramill.jobs.train.loop import open_run
from loramill.jobs.worker import publish, sweep
from loramill.jobs.worker.admission import SessionMemory, may_join
from loramill.jobs.worker.lease import Lease
from loramill.jobs.worker.worker import (
    OUTAGE_ERRORS,
    Worker,
    lease_next_job,
    recorded_attempt,
    remove_checkpoints,
    reported_steps,
    run_job,
    training_context,
)
from loramill.kernels.device import device_works, free_cached_memory
from loramill.settings import JobSettings
from loramill.sizing.tenants import PASS_TOKENS
from loramill.types import JobRecord

log = logging.getLogger(__name__)

#: Seconds between two queries of the queue.
POLL_SECONDS = 0.25
#: Seconds of pause after an outage; they double with each further job that ends in one, up to the maximum.
OUTAGE_PAUSE_SECONDS, MAX_OUTAGE_PAUSE_SECONDS = 3.0, 60.0
#: Threads that read data and publish versions while passes run.
BACKGROUND_THREADS = 2
#: How many jobs a session may train at once when it starts or finds the queue empty, by type of device; the limit
#: doubles each time a job ends. On a CPU eight small jobs together take 5.6 times as long as one, so that without a
#: backlog most of them are done sooner one by one.
JOBS_AT_START = {"cpu": 1, "cuda": 1024}


def run_jobs(
    worker: Worker,
    *,
    should_stop: Callable[[float], bool],
    may_take_another: Callable[[], bool] = lambda: True,
    memory: SessionMemory | None = None,
) -> int:
    """Runs jobs until the session should stop and the jobs that it has are done; returns how many attempts ended.

    Args:
        should_stop: called with the seconds since the session last had a job, whenever it may lease one.
        may_take_another: whether it is this session's turn to train one more job next to those that it has.
        memory: of this session; None: not known, and not checked.

    Raises:
        Unavailable: a job left the GPU unusable for this process; other jobs would only fail.
    """
    with _open_session(worker, memory) as session:
        while session.has_jobs or not session.stopping:
            if session.may_lease():
                session.lease(should_stop, may_take_another)
            session.run_pass()
    return session.ended


@contextmanager
def _open_session(worker: Worker, memory: SessionMemory | None) -> Iterator[_Session]:
    model, settings = worker.model(), worker.settings
    pass_tokens = max_pass_tokens(settings, worker.device)
    with (
        configured_forward(model, pass_tokens, deterministic=settings.deterministic),
        ThreadPoolExecutor(BACKGROUND_THREADS, thread_name_prefix="session") as background,
    ):
        session = _Session(worker, Driver(TrainingEngine(model), pass_tokens), background, memory)
        try:
            yield session
        finally:
            session.close()


def max_pass_tokens(settings: JobSettings, device: torch.device) -> int:
    """Maximum tokens of a pass that several jobs share."""
    return settings.pass_tokens or PASS_TOKENS[device.type]


class _Session:
    """The jobs of a session, and when it leases the next one.

    Attributes:
        stopping: it leases no further job.
        ended: number of attempts that ended.
    """

    def __init__(
        self,
        worker: Worker,
        driver: Driver[LoramillError | None],
        background: ThreadPoolExecutor,
        memory: SessionMemory | None,
    ) -> None:
        self.stopping, self.ended = False, 0
        self._worker, self._driver, self._background, self._memory = worker, driver, background, memory
        self._jobs: dict[str, JobRecord] = {}
        self._max_jobs = self._jobs_at_start = min(worker.settings.per_session, JOBS_AT_START[worker.device.type])
        self._idle_since, self._next_lease_at = time.monotonic(), 0.0
        self._settle_from, self._outage_pause = 0.0, OUTAGE_PAUSE_SECONDS

    @property
    def has_jobs(self) -> bool:
        """Whether a job is in training."""
        return len(self._driver) > 0

    def may_lease(self) -> bool:
        """Whether there is room for another job, and it is time to query the queue."""
        room = len(self._jobs) < self._max_jobs and self._driver.has_room
        return room and not self.stopping and time.monotonic() >= self._next_lease_at

    def lease(self, should_stop: Callable[[float], bool], may_take_another: Callable[[], bool]) -> None:
        """Leases the next job and starts its work, if one waits and the session should not stop."""
        now = time.monotonic()
        try:
            if should_stop(0.0 if self.has_jobs else now - self._idle_since):
                self.stopping = True
                return
            job = None
            if not self.has_jobs or may_take_another():
                job = lease_next_job(self._worker, settle=now >= self._settle_from, admits=self._admits)
        except LoramillError as error:
            log.warning("no job could be leased; retrying: %s", error.message)
            # During the outage workers that hold a job could not send heartbeats: they get time to do it first.
            self._settle_from = now + OUTAGE_PAUSE_SECONDS + self._worker.settings.lease_seconds
            self._next_lease_at = now + OUTAGE_PAUSE_SECONDS
            return
        if job is None:
            self._next_lease_at = now + POLL_SECONDS
            self._max_jobs = self._max_jobs if self.has_jobs else self._jobs_at_start
        else:
            self._jobs[job.id] = job
            self._driver.start(job.id, job.tenant, self._attempt(job))

    def run_pass(self) -> None:
        """Runs one pass; without a job, waits until the queue may be queried again.

        Raises:
            Unavailable: as `run_jobs`.
        """
        for ended in self._driver.run_pass(POLL_SECONDS):
            self._end(ended)
        if not self.has_jobs and not self.stopping:
            time.sleep(max(0.0, self._next_lease_at - time.monotonic()))

    def close(self) -> None:
        """Leaves the jobs that are still in training to other attempts."""
        self._driver.close()

    def _admits(self, job: JobRecord) -> bool:
        return may_join(job, self._jobs.values(), self._memory)

    def _end(self, ended: Ended[LoramillError | None]) -> None:
        del self._jobs[ended.name]
        self._max_jobs = min(2 * self._max_jobs, self._worker.settings.per_session)
        if ended.error is not None:
            raise ended.error
        if ended.value is not None and not device_works(self._worker.device):
            raise Unavailable("The GPU of this session does not compute any more; the session is being replaced.")
        free_cached_memory(self._worker.device)  # the next job's tensors have other sizes
        self.ended, self._idle_since = self.ended + 1, time.monotonic()
        if isinstance(ended.value, OUTAGE_ERRORS):
            self._next_lease_at = time.monotonic() + self._outage_pause
            self._outage_pause = min(2 * self._outage_pause, MAX_OUTAGE_PAUSE_SECONDS)
        else:
            self._outage_pause = OUTAGE_PAUSE_SECONDS

    def _attempt(self, job: JobRecord) -> Work[LoramillError | None]:
        with recorded_attempt(self._worker, job) as attempt:
            if job.spec.method == "full":  # trains weights of its own, while the other jobs wait
                run_job(self._worker, job, attempt.lease)
            else:
                yield from self._job(job, attempt.lease)
        return attempt.error

    def _job(self, job: JobRecord, lease: Lease) -> Work[None]:
        """`run_job` by shared passes. Other jobs train while this one's data is read and its versions are stored."""
        worker = self._worker
        context = yield self._background.submit(training_context, worker, job, lease.raise_if_stopped)
        if job.spec.candidates:
            yield from sweep.train_best(worker, job, lease, context, self._background)
        else:
            with reported_steps(worker, job, lease) as report, open_run(worker.model(), context) as run:
                while not run.state.finished:
                    progress = yield from run.advance()
                    report(progress)
                    if progress.valid_loss is not None:
                        yield self._background.submit(publish.checkpoint, worker, job, progress)
            yield self._background.submit(publish.version, worker, job, lease.last_progress)
        remove_checkpoints(worker, job)
