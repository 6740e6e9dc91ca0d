"""What the supervisor does next: a pure function of the jobs that wait and run and the worker slots that are held.

A pool has a number of worker slots. A session takes one and runs job after job; a job with its own trainer takes one or
more while it runs. Sessions choose their jobs themselves, in the queue's order. The supervisor therefore only makes
sure that there are enough sessions, that a job with its own trainer gets its slots when it is its turn, and that a job
of a higher priority does not wait for jobs of lower priorities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from loramill.registry.jobs.worker_slots import WorkerSlot
from loramill.types import Executor

SESSION_PREFIX = "session-"


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that may start; it takes `slot_count` worker slots."""

    id: str
    executor: Executor
    priority: int
    slot_count: int = 1


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that runs, in a session or in its own trainer.

    Attributes:
        worker_slot: the session's name, or the job's id if it has its own trainer.
        stopping: its owner or a supervisor has already requested that it stops.
    """

    id: str
    attempt: int
    priority: int
    started_at: float
    worker_slot: str
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class PoolState:
    """The state of a pool of `slot_count` worker slots; `waiting` is in the queue's order."""

    slot_count: int
    held_slots: tuple[WorkerSlot, ...] = ()
    running: tuple[RunningJob, ...] = ()
    waiting: tuple[WaitingJob, ...] = ()


@dataclass(frozen=True, slots=True)
class StartSession:
    """Start a session under this name."""

    name: str


@dataclass(frozen=True, slots=True)
class StartTrainer:
    """Start a trainer for this job alone."""

    job: str
    slot_count: int


@dataclass(frozen=True, slots=True)
class EndSession:
    """Let this session take no further job."""

    name: str


@dataclass(frozen=True, slots=True)
class Preempt:
    """Let this attempt of a job write a checkpoint and stop."""

    job: str
    attempt: int


Action = StartSession | StartTrainer | EndSession | Preempt


def decide(pool: PoolState) -> tuple[Action, ...]:
    """Returns the actions that bring the pool closer to running the first of the waiting jobs.

    Each waiting job in turn gets an idle slot, a free one, one that is about to be free, or that of a running job of a
    lower priority: of the lowest priority, and of these the youngest. The first job that gets none holds back the jobs
    after it, so that small jobs can't overtake a large one forever.
    """
    plan = _Plan(pool)
    for job in pool.waiting:
        placed = plan.place_in_session(job) if job.executor == "session" else plan.place_in_trainer(job)
        if not placed:
            break
    return tuple(plan.actions)


class _SlotState(Enum):
    IDLE = auto()  # a session without a job
    BUSY = auto()
    IDLE_SOON = auto()  # a session whose job is stopping
    FREE_SOON = auto()  # a session that is ending, or a trainer that is stopping


@dataclass(slots=True)
class _PlannedSlot:
    """A held slot after the plan's actions; `claimed` of its `size` are promised to waiting jobs once they are free."""

    name: str
    size: int
    state: _SlotState
    claimed: int = 0

    @property
    def takes_jobs(self) -> bool:
        """Whether this is a session that is not ending."""
        return self.name.startswith(SESSION_PREFIX) and self.state is not _SlotState.FREE_SOON

    def claim(self) -> None:
        """Promises the slot, or one unit of a larger one, to a waiting job."""
        if self.state is _SlotState.FREE_SOON:
            self.claimed = min(self.size, self.claimed + 1)
        else:
            self.state = _SlotState.BUSY


def _state_of(slot: WorkerSlot, running: Iterable[RunningJob]) -> _SlotState:
    jobs = [job for job in running if job.worker_slot == slot.name]
    stopping = any(job.stopping for job in jobs)
    if slot.ending:
        return _SlotState.FREE_SOON
    if not slot.name.startswith(SESSION_PREFIX):
        return _SlotState.FREE_SOON if stopping else _SlotState.BUSY
    if stopping:
        return _SlotState.IDLE_SOON
    return _SlotState.BUSY if jobs else _SlotState.IDLE


class _Plan:
    """The slots as they will be after `actions`. Each action has one method, which adds it and changes its slot."""

    def __init__(self, pool: PoolState) -> None:
        self.actions: list[Action] = []
        self._pool = pool
        self._slots = {
            slot.name: _PlannedSlot(slot.name, slot.size, _state_of(slot, pool.running))
            for slot in sorted(pool.held_slots, key=lambda slot: slot.name)
        }

    def place_in_session(self, job: WaitingJob) -> bool:
        """Finds a slot for a job that runs in a session; False if it has to wait."""
        if slot := self._unclaimed(_SlotState.IDLE):
            slot.claim()
        elif self._free_count() > 0:
            self._start_session()
        elif slot := self._unclaimed(_SlotState.IDLE_SOON) or self._unclaimed(_SlotState.FREE_SOON):
            slot.claim()
        elif victims := self._preemptible(below=job.priority):
            self._preempt(victims[0])
            self._slots[victims[0].worker_slot].claim()
        else:
            return False
        return True

    def place_in_trainer(self, job: WaitingJob) -> bool:
        """Finds slots for a job with its own trainer; False if it has to wait."""
        if job.id in self._slots:
            return True  # its trainer is about to lease it
        count = min(job.slot_count, self._pool.slot_count)
        if self._free_count() >= count:
            self._start_trainer(job.id, count)
            return True
        self._make_room(count - self._free_count() - self._free_soon_count(), job.priority)
        return False

    def _make_room(self, missing: int, priority: int) -> None:
        """Frees slots, now or when jobs of the same or a lower priority have ended."""
        while missing > 0 and (slot := self._unclaimed(_SlotState.IDLE)):
            self._end_session(slot.name)
            missing -= 1
        while missing > 0 and (victims := self._preemptible(below=priority)):
            self._preempt(victims[0])
            slot = self._slots[victims[0].worker_slot]
            if slot.takes_jobs:
                self._end_session(slot.name)
            missing -= slot.size
        for job in self._preemptible(below=priority + 1):
            if missing > 0 and self._slots[job.worker_slot].takes_jobs:
                self._end_session(job.worker_slot)
                missing -= 1

    def _start_session(self) -> None:
        numbers = range(1, self._pool.slot_count + 1)
        name = next(name for number in numbers if (name := f"{SESSION_PREFIX}{number}") not in self._slots)
        self._slots[name] = _PlannedSlot(name, 1, _SlotState.BUSY)
        self.actions.append(StartSession(name))

    def _start_trainer(self, job: str, count: int) -> None:
        self._slots[job] = _PlannedSlot(job, count, _SlotState.BUSY)
        self.actions.append(StartTrainer(job, count))

    def _end_session(self, name: str) -> None:
        self._slots[name].state = _SlotState.FREE_SOON
        self.actions.append(EndSession(name))

    def _preempt(self, job: RunningJob) -> None:
        slot = self._slots[job.worker_slot]
        if slot.state is _SlotState.BUSY:
            slot.state = _SlotState.IDLE_SOON if slot.takes_jobs else _SlotState.FREE_SOON
        self.actions.append(Preempt(job.id, job.attempt))

    def _free_count(self) -> int:
        return self._pool.slot_count - sum(slot.size for slot in self._slots.values())

    def _free_soon_count(self) -> int:
        return sum(slot.size - slot.claimed for slot in self._slots.values() if slot.state is _SlotState.FREE_SOON)

    def _unclaimed(self, state: _SlotState) -> _PlannedSlot | None:
        slots = (slot for slot in reversed(self._slots.values()) if slot.state is state)
        return next((slot for slot in slots if slot.claimed < slot.size), None)

    def _preemptible(self, *, below: int) -> list[RunningJob]:
        """Running jobs of a priority below this, in the order in which they are preempted."""
        return [
            job
            for job in preemption_order(self._pool.running)
            if job.priority < below
            and not job.stopping
            and job.worker_slot in self._slots
            and Preempt(job.id, job.attempt) not in self.actions
        ]


def preemption_order(running: Iterable[RunningJob]) -> list[RunningJob]:
    """Returns the jobs in the order in which they are preempted: the lowest priority first, of these the youngest."""
    return sorted(running, key=lambda job: (job.priority, -job.started_at, job.id))
