"""The supervisor without Ray: reads the registry, decides, and starts what is missing, each in its own thread.

It has no state that matters: everything that must be done is in the registry, and the worker slots of a supervisor that
vanished become free after a few seconds.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.jobs.scheduling.policy import (
    SESSION_PREFIX,
    EndSession,
    PoolState,
    Preempt,
    RunningJob,
    StartSession,
    StartTrainer,
    WaitingJob,
    decide,
)
from loramill.registry import Registry, jobs
from loramill.registry.database.tables import JobRow
from loramill.registry.jobs import queue, worker_slots
from loramill.settings import JobSettings
from loramill.types import JobStatus

log = logging.getLogger(__name__)

#: Seconds without a renewal after which a supervisor has lost its worker slots.
SLOT_LEASE_SECONDS = 5.0
POLL_SECONDS, OUTAGE_PAUSE_SECONDS = 1.0, 3.0


class Reconciler:
    """Keeps as many sessions and trainers running as the queue needs.

    Args:
        base: fingerprint of the base that is trained here; jobs of other bases wait. None for any.
        run_session: runs a session until it ends; called in its own thread with the worker slot's name and `holder`.
        run_trainer: runs the trainer of one job; called likewise with the job's id and the number of its processes.
    """

    def __init__(
        self,
        registry: Registry,
        settings: JobSettings,
        *,
        base: str | None = None,
        run_session: Callable[[str, str], None],
        run_trainer: Callable[[str, int], None],
    ) -> None:
        self.holder = uuid.uuid4().hex
        self._registry, self._settings, self._base = registry, settings, base
        self._settle_from = 0.0
        self._run_session, self._run_trainer = run_session, run_trainer
        self._threads: dict[str, threading.Thread] = {}

    @property
    def active_slots(self) -> list[str]:
        """The names of the worker slots in which something runs."""
        return sorted(name for name, thread in self._threads.items() if thread.is_alive())

    def run(self, stopped: threading.Event) -> None:
        """Reconciles again and again until `stopped` is set, also after errors."""
        pause = 0.0
        while not stopped.wait(pause):
            try:
                self.reconcile()
                pause = POLL_SECONDS
            except Exception:  # for example a busy database: the next attempt may succeed
                log.exception("the supervisor could not reconcile the pool; retrying")
                pause = OUTAGE_PAUSE_SECONDS
                # No worker could send heartbeats during the outage: they keep their jobs if they do it soon.
                self._settle_from = time.monotonic() + OUTAGE_PAUSE_SECONDS + self._settings.lease_seconds

    def reconcile(self) -> None:
        """Queues again the jobs whose leases ran out, and takes the next actions.

        Not thread-safe: another thread would free a slot that this one has claimed but not yet started.

        Raises:
            Unavailable, DiskFull, DatabaseUnusable: the database can't be used.
        """
        now = time.time()
        with self._registry.writing() as session:
            if time.monotonic() >= self._settle_from:
                jobs.reclaim_expired(session, now=now, max_attempts=self._settings.max_attempts)
            worker_slots.renew(session, self.holder, self.active_slots, now=now, seconds=SLOT_LEASE_SECONDS)
        with self._registry.reading() as session:
            pool = read_pool_state(session, self._settings, now, self._base)
        for action in decide(pool):
            match action:
                case StartSession(name):
                    self._start(name, 1, lambda name=name: self._run_session(name, self.holder))  # type: ignore[misc]
                case StartTrainer(job, count):
                    self._start(job, count, lambda job=job: self._run_job_trainer(job))  # type: ignore[misc]
                case EndSession(name):
                    with self._registry.writing() as session:
                        worker_slots.request_end(session, name)
                case Preempt(job, attempt):
                    with self._registry.writing() as session:
                        jobs.preempt(session, job, attempt)

    def _start(self, name: str, size: int, run: Callable[[], None]) -> None:
        """Claims a worker slot and calls `run` in a thread, unless another supervisor has claimed the slot."""
        if name in self.active_slots:
            return
        with self._registry.writing() as session:
            if not worker_slots.claim(
                session, name, self.holder, now=time.time(), seconds=SLOT_LEASE_SECONDS, size=size
            ):
                return
        thread = threading.Thread(target=_run_logged, args=(name, run), name=name, daemon=True)
        self._threads = {name: thread for name, thread in self._threads.items() if thread.is_alive()} | {name: thread}
        thread.start()

    def _run_job_trainer(self, job_id: str) -> None:
        """Runs a job's own trainer; an error that ends the trainer is added to the job's history."""
        with self._registry.reading() as session:
            gpus = jobs.get(session, job_id).spec.gpus
        try:
            self._run_trainer(job_id, gpus)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            with self._registry.writing() as session:
                jobs.add_event(session, job_id, f"Its trainer ended: {reason[-1]}", level="warn")
            raise


def read_pool_state(session: Session, settings: JobSettings, now: float, base: str | None = None) -> PoolState:
    """Reads the pool from the registry, with at most as many waiting jobs (of this base, if given) as worker slots."""
    running = session.execute(
        select(
            JobRow.id,
            JobRow.attempt,
            JobRow.priority,
            JobRow.started_at,
            JobRow.owner,
            JobRow.pending_action,
            JobRow.alone,
        ).where(JobRow.status == JobStatus.RUNNING)
    )
    return PoolState(
        slot_count=settings.sessions,
        held_slots=tuple(worker_slots.list_held(session, now)),
        running=tuple(
            RunningJob(
                row.id,
                row.attempt,
                row.priority,
                row.started_at,
                worker_slot_of(row.owner),
                row.pending_action is not None,
                row.alone,
            )
            for row in running
        ),
        waiting=tuple(
            WaitingJob(job.id, job.executor, job.priority, _slots_needed(session, job, settings), job.alone)
            for job in queue.startable_jobs(session, now, executor=None, limit=settings.sessions, base=base)
        ),
        per_session=settings.per_session,
    )


def may_take_another(session: Session, worker_slot: str, now: float) -> bool:
    """Whether no other open session has fewer jobs than this one, so that jobs spread evenly over the pool."""
    owners = session.scalars(select(JobRow.owner).where(JobRow.status == JobStatus.RUNNING))
    counts = Counter(worker_slot_of(owner) for owner in owners if owner is not None)
    names = (slot.name for slot in worker_slots.list_held(session, now) if not slot.ending)
    return all(counts[worker_slot] <= counts[name] for name in names if name.startswith(SESSION_PREFIX))


def worker_name(worker_slot: str, pid: int) -> str:
    """Returns the name of a worker in the registry."""
    return f"{worker_slot}:{pid}"


def worker_slot_of(worker: str) -> str:
    """Returns the worker slot of a worker by its name."""
    return worker.partition(":")[0]


def _slots_needed(session: Session, job: queue.QueuedJob, settings: JobSettings) -> int:
    if job.executor == "session":
        return 1
    return jobs.get(session, job.id).spec.gpus * (settings.per_gpu if settings.on_gpu else 1)


def _run_logged(name: str, run: Callable[[], None]) -> None:
    try:
        run()
    except Exception:  # the jobs are in the registry; the next reconciliation starts what is missing
        log.exception("%s ended with an error", name)
        time.sleep(SLOT_LEASE_SECONDS)  # keeps the slot, so that what fails at once is not started again at once
