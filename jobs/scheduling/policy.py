"""What a supervisor does next: a pure function of what is waiting, running and held.

A pool has a number of places. A session takes one and runs job after job; a job with a trainer of its own takes one or
more while it runs. Sessions choose their jobs themselves, in the queue's order; so the supervisor has only to see that
there are enough of them, that a job with its own trainer finds room when it is its turn, and that a job of a higher
priority doesn't wait for those of lower ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loramill.registry.jobs.worker_slots import WorkerSlot
from loramill.types import Executor

SESSION_PREFIX = "session-"


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that may start; `size` is how many places it takes."""

    id: str
    executor: Executor
    priority: int
    slot_count: int = 1


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that runs: in the session of that place, or, if that is its id, by its own trainer.

    `stopping`: its owner or a supervisor has asked it to stop already.
    """

    id: str
    attempt: int
    priority: int
    started_at: float
    worker_slot: str
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class PoolState:
    """What there is: `size` places, those held, and jobs; `waiting` in the queue's order."""

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
    """Let this attempt of a job write a checkpoint and make room."""

    job: str
    attempt: int


Action = StartSession | StartTrainer | EndSession | Preempt


def decide(pool: PoolState) -> tuple[Action, ...]:
    """The actions that bring the pool closer to running the first of the waiting jobs.

    Each waiting job in turn gets an idle place, a free one, one that is about to be free, or that of a running job of a
    lower priority: the lowest, and of these the youngest. The first that gets none keeps those after it waiting, so
    that a large job isn't passed by small ones for ever.
    """
    plan = _Plan(pool)
    for job in pool.waiting:
        if not (plan.in_session(job) if job.executor == "session" else plan.by_itself(job)):
            break
    return tuple(plan.actions)


class _Plan:
    """The pool as it will be after `actions`."""

    def __init__(self, pool: PoolState) -> None:
        busy = {job.worker_slot for job in pool.running}
        stopping = {job.worker_slot for job in pool.running if job.stopping}
        sessions = {place.name for place in pool.held_slots if place.name.startswith(SESSION_PREFIX)}
        ending = {place.name for place in pool.held_slots if place.ending}
        self.actions: list[Action] = []
        self._held = {place.name: place.size for place in pool.held_slots}
        self._free = pool.slot_count - sum(self._held.values())
        self._open = sessions - ending
        self._idle = sorted(self._open - busy)
        #: Sessions about to be idle, and places about to be free.
        self._idle_soon = len(self._open & stopping)
        self._free_soon = sum(
            size for name, size in self._held.items() if name in ending or (name in stopping and name not in sessions)
        )
        self._victims = [
            job for job in preemption_order(pool.running) if not job.stopping and job.worker_slot in self._held
        ]
        self._size = pool.slot_count

    def in_session(self, job: WaitingJob) -> bool:
        """Finds a place for a job that runs in a session."""
        if self._idle:
            self._idle.pop()
        elif self._free > 0:
            self._start_session()
        elif self._idle_soon:
            self._idle_soon -= 1
        elif self._free_soon:
            self._free_soon -= 1
        else:
            victim = self._victim_below(job.priority)
            if victim is None:
                return False
            self._preempt(victim)
            self._free_soon += self._held[victim.worker_slot] - 1
        return True

    def by_itself(self, job: WaitingJob) -> bool:
        """Finds places for a job with a trainer of its own; False while it waits for them."""
        if job.id in self._held:
            return True  # its trainer is about to lease it
        size = min(job.slot_count, self._size)
        if self._free >= size:
            self.actions.append(StartTrainer(job.id, size))
            self._free -= size
            return True
        self._make_room(size - self._free - self._free_soon, job.priority)
        return False

    def _make_room(self, missing: int, priority: int) -> None:
        """Frees places, now or when jobs of the same or a lower priority have ended."""
        while missing > 0 and self._idle:
            self._end(self._idle.pop())
            missing -= 1
        while missing > 0 and (victim := self._victim_below(priority)) is not None:
            self._preempt(victim)
            if victim.worker_slot in self._open:
                self._end(victim.worker_slot)
            missing -= self._held[victim.worker_slot]
        for job in [job for job in self._victims if job.priority <= priority and job.worker_slot in self._open]:
            if missing > 0:
                self._end(job.worker_slot)
                missing -= 1

    def _start_session(self) -> None:
        number = next(n for n in range(1, self._size + 1) if f"{SESSION_PREFIX}{n}" not in self._held)
        name = f"{SESSION_PREFIX}{number}"
        self._held[name] = 1
        self._free -= 1
        self.actions.append(StartSession(name))

    def _victim_below(self, priority: int) -> RunningJob | None:
        return next((job for job in self._victims if job.priority < priority), None)

    def _preempt(self, job: RunningJob) -> None:
        self._victims.remove(job)
        self.actions.append(Preempt(job.id, job.attempt))

    def _end(self, name: str) -> None:
        self._open.discard(name)
        self.actions.append(EndSession(name))


def preemption_order(running: Iterable[RunningJob]) -> list[RunningJob]:
    """The jobs in the order in which they make room."""
    return sorted(running, key=lambda job: (job.priority, -job.started_at, job.id))
