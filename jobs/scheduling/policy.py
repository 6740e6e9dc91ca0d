"""What the supervisor does next: a pure function of the jobs that wait and run and the worker slots that are held.

A pool has a number of worker slots. A session takes one and runs up to `per_session` jobs at once; a job with its own
trainer takes one or more while it runs. Sessions choose their jobs themselves, in the queue's order. The supervisor
therefore only makes sure that there are enough sessions, that a job with its own trainer gets its slots when it is its
turn, and that a job of a higher priority does not wait for jobs of lower priorities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from loramill.registry.jobs.worker_slots import WorkerSlot
from loramill.types import Executor

SESSION_PREFIX = "session-"


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that may start.

    Attributes:
        slot_count: worker slots that its own trainer takes.
        alone: it needs a session for itself.
    """

    id: str
    executor: Executor
    priority: int
    slot_count: int = 1
    alone: bool = False


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that runs, in a session or in its own trainer.

    Attributes:
        worker_slot: the session's name, or the job's id if it has its own trainer.
        stopping: its owner or a supervisor has already requested that it stops.
        alone: no other job may join its session.
    """

    id: str
    attempt: int
    priority: int
    started_at: float
    worker_slot: str
    stopping: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class PoolState:
    """The state of a pool of `slot_count` worker slots; `waiting` is in the queue's order.

    Attributes:
        per_session: maximum number of jobs of a session.
    """

    slot_count: int
    held_slots: tuple[WorkerSlot, ...] = ()
    running: tuple[RunningJob, ...] = ()
    waiting: tuple[WaitingJob, ...] = ()
    per_session: int = 1


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

    Each waiting job for a session in turn gets an idle session, else a new one in a free slot, else room next to other
    jobs, else room that is about to be free, else that of a running job of a lower priority: of the lowest priority,
    and of these the youngest. A job with its own trainer gets free slots, or makes room for itself and waits. The first
    job that gets none holds back the jobs after it, so that small jobs can't overtake a large one forever.
    """
    plan = _Plan(pool)
    for job in pool.waiting:
        placed = plan.place_in_session(job) if job.executor == "session" else plan.place_in_trainer(job)
        if not placed:
            break
    return tuple(plan.actions)


class _Kind(Enum):
    SESSION = auto()
    TRAINER = auto()
    FREE_SOON = auto()  # a session that is ending, or a trainer that is stopping


@dataclass(slots=True)
class _PlannedSlot:
    """A held slot after the plan's actions.

    Attributes:
        capacity: maximum number of jobs of a session; 0 for one that takes none.
        jobs: number of its jobs that keep running.
        stopping: number of its jobs that are about to stop.
        promised: number of waiting jobs that it is to take, now or once there is room.
    """

    name: str
    size: int
    kind: _Kind
    capacity: int
    jobs: int = 0
    stopping: int = 0
    promised: int = 0

    @property
    def room(self) -> int:
        """Number of further jobs that the session can take now."""
        return self.capacity - self.jobs - self.stopping - self.promised if self.kind is _Kind.SESSION else 0

    @property
    def is_idle(self) -> bool:
        """Whether this is a session without any job."""
        return self.kind is _Kind.SESSION and not self.jobs + self.stopping + self.promised

    def may_get(self, job: WaitingJob) -> bool:
        """Whether the job can have what is free once what is about to stop has stopped."""
        return not (job.alone and self.jobs + self.promised)

    @property
    def room_soon(self) -> int:
        """Number of further jobs for which there is room once what is about to stop has stopped."""
        if self.kind is _Kind.FREE_SOON:
            return max(0, self.size - self.promised)
        return min(self.stopping, self.capacity - self.jobs - self.promised)


def _planned(slot: WorkerSlot, pool: PoolState) -> _PlannedSlot:
    jobs = [job for job in pool.running if job.worker_slot == slot.name]
    stopping = sum(job.stopping for job in jobs)
    kind = _Kind.SESSION if slot.name.startswith(SESSION_PREFIX) else _Kind.TRAINER
    if slot.ending or (kind is _Kind.TRAINER and stopping):
        kind = _Kind.FREE_SOON
    capacity = 0 if kind is not _Kind.SESSION else 1 if any(job.alone for job in jobs) else pool.per_session
    return _PlannedSlot(slot.name, slot.size, kind, capacity, len(jobs) - stopping, stopping)


class _Plan:
    """The slots as they will be after `actions`. Each action has one method, which adds it and changes its slot."""

    def __init__(self, pool: PoolState) -> None:
        self.actions: list[Action] = []
        self._pool = pool
        self._slots = {slot.name: _planned(slot, pool) for slot in sorted(pool.held_slots, key=lambda slot: slot.name)}

    def place_in_session(self, job: WaitingJob) -> bool:
        """Finds a session for a job; False if the job has to wait."""
        if slot := self._find(lambda slot: slot.is_idle):
            self._promise(slot, job)
        elif self._free_count() > 0:
            self._promise(self._start_session(), job)
        elif slot := self._shareable(job) or self._find(lambda slot: slot.room_soon > 0 and slot.may_get(job)):
            self._promise(slot, job)
        elif victims := self._victims(job):
            for victim in victims:
                self._preempt(victim)
            self._promise(self._slots[victims[0].worker_slot], job)
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
        self._make_room(count - self._free_count() - self._free_soon_count(job.priority), job.priority)
        return False

    def _make_room(self, missing: int, priority: int) -> None:
        """Frees slots, now or when jobs of the same or a lower priority have ended."""
        while missing > 0 and (slot := self._find(lambda slot: slot.is_idle)):
            self._end_session(slot)
            missing -= slot.size
        for slot in self._preemptible_slots(below=priority):
            if missing > 0:
                for job in self._preemptible(below=priority):
                    if job.worker_slot == slot.name:
                        self._preempt(job)
                if slot.kind is _Kind.SESSION:
                    self._end_session(slot)
                missing -= slot.size
        for slot in self._preemptible_slots(below=priority + 1):
            if missing > 0 and slot.kind is _Kind.SESSION:
                self._end_session(slot)
                missing -= slot.size

    def _shareable(self, job: WaitingJob) -> _PlannedSlot | None:
        """Returns a session that can take the job next to others."""
        return None if job.alone else self._find(lambda slot: slot.room > 0)

    def _promise(self, slot: _PlannedSlot, job: WaitingJob) -> None:
        """Promises a place to a waiting job."""
        slot.promised += 1
        if job.alone:
            slot.capacity = min(slot.capacity, 1)

    def _start_session(self) -> _PlannedSlot:
        numbers = range(1, self._pool.slot_count + 1)
        name = next(name for number in numbers if (name := f"{SESSION_PREFIX}{number}") not in self._slots)
        self._slots[name] = _PlannedSlot(name, 1, _Kind.SESSION, self._pool.per_session)
        self.actions.append(StartSession(name))
        return self._slots[name]

    def _start_trainer(self, job: str, count: int) -> None:
        self._slots[job] = _PlannedSlot(job, count, _Kind.TRAINER, 0)
        self.actions.append(StartTrainer(job, count))

    def _end_session(self, slot: _PlannedSlot) -> None:
        slot.kind = _Kind.FREE_SOON
        self.actions.append(EndSession(slot.name))

    def _preempt(self, job: RunningJob) -> None:
        slot = self._slots[job.worker_slot]
        slot.jobs, slot.stopping = slot.jobs - 1, slot.stopping + 1
        if slot.kind is _Kind.TRAINER:
            slot.kind = _Kind.FREE_SOON
        self.actions.append(Preempt(job.id, job.attempt))

    def _free_count(self) -> int:
        return self._pool.slot_count - sum(slot.size for slot in self._slots.values())

    def _free_soon_count(self, priority: int) -> int:
        """Number of slots that become free without a preemption.

        Ending sessions all of whose jobs have lower priorities are left out, since these jobs are preempted.
        """
        preemptible = {slot.name for slot in self._preemptible_slots(below=priority)}
        free_soon = (slot for slot in self._slots.values() if slot.kind is _Kind.FREE_SOON)
        return sum(slot.room_soon for slot in free_soon if slot.name not in preemptible)

    def _find(self, fits: Callable[[_PlannedSlot], bool]) -> _PlannedSlot | None:
        """Returns the slot with the fewest jobs of those that fit, and of these the last one by name."""
        return min(
            filter(fits, reversed(self._slots.values())), key=lambda slot: slot.jobs + slot.promised, default=None
        )

    def _victims(self, job: WaitingJob) -> list[RunningJob]:
        """Returns the jobs to preempt for a job of a session: one, or all of a session if it needs one for itself."""
        running = self._preemptible(below=job.priority)
        if not job.alone:
            # Of an ending session with several jobs, one that stops makes no room.
            ending = {slot.name for slot in self._slots.values() if slot.kind is _Kind.FREE_SOON and slot.jobs > 1}
            return [each for each in running if each.worker_slot not in ending][:1]
        slots = self._preemptible_slots(below=job.priority)
        return [each for each in running if slots and each.worker_slot == slots[0].name]

    def _preemptible(self, *, below: int) -> list[RunningJob]:
        """Returns the running jobs of a priority below this, in the order in which they are preempted."""
        return [
            job
            for job in preemption_order(self._pool.running)
            if job.priority < below
            and not job.stopping
            and job.worker_slot in self._slots
            and Preempt(job.id, job.attempt) not in self.actions
        ]

    def _preemptible_slots(self, *, below: int) -> list[_PlannedSlot]:
        """Returns the slots all of whose jobs have a priority below this, in the order in which they are preempted."""
        found: dict[str, list[RunningJob]] = {}
        for job in preemption_order(self._pool.running):
            found.setdefault(job.worker_slot, []).append(job)
        return [
            slot
            for name, jobs in sorted(found.items(), key=lambda each: max(job.priority for job in each[1]))
            if (slot := self._slots.get(name)) is not None
            and slot.jobs > 0
            and not slot.promised
            and max(job.priority for job in jobs) < below
        ]


def preemption_order(running: Iterable[RunningJob]) -> list[RunningJob]:
    """Returns the jobs in the order in which they are preempted: the lowest priority first, of these the youngest."""
    return sorted(running, key=lambda job: (job.priority, -job.started_at, job.id))
