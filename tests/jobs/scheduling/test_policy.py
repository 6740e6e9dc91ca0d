"""The supervisor's decisions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loramill.jobs.scheduling.policy import (
    Action,
    EndSession,
    PoolState,
    Preempt,
    RunningJob,
    StartSession,
    StartTrainer,
    WaitingJob,
    decide,
)
from loramill.registry.jobs.worker_slots import WorkerSlot


def session(number: int, ending: bool = False) -> WorkerSlot:
    return WorkerSlot(name=f"session-{number}", holder="h", size=1, ending=ending)


def trainer(job: str, size: int) -> WorkerSlot:
    return WorkerSlot(name=job, holder="h", size=size, ending=False)


def running(job: str, slot: str, **fields: Any) -> RunningJob:
    return RunningJob(**{"id": job, "attempt": 1, "priority": 0, "started_at": 0.0, "worker_slot": slot} | fields)


def small(job: str, priority: int = 0, alone: bool = False) -> WaitingJob:
    return WaitingJob(job, "session", priority, alone=alone)


def large(job: str, size: int, priority: int = 0) -> WaitingJob:
    return WaitingJob(job, "dedicated", priority, size)


BUSY = (running("a", "session-1", started_at=1.0), running("b", "session-2", started_at=2.0))
TWO = (session(1), session(2))
THREE_JOBS = (*BUSY, running("c", "session-2", started_at=3.0, priority=1))


def shared(*fields: Any) -> PoolState:
    """A pool of two slots whose sessions run up to two jobs."""
    return PoolState(2, *fields, per_session=2)


CASES: dict[str, tuple[PoolState, tuple[Action, ...]]] = {
    "nothing waits": (PoolState(2), ()),
    "nothing waits, and a session is idle": (PoolState(2, TWO), ()),
    "one session starts per job": (
        PoolState(4, waiting=(small("a"), small("b"))),
        (StartSession("session-1"), StartSession("session-2")),
    ),
    "no more sessions start than there are slots": (
        PoolState(2, waiting=(small("a"), small("b"), small("c"))),
        (StartSession("session-1"), StartSession("session-2")),
    ),
    "an idle session takes the job": (PoolState(2, (session(2),), waiting=(small("a"),)), ()),
    "a new session gets a free name": (
        PoolState(2, (session(2),), waiting=(small("a"), small("b"))),
        (StartSession("session-1"),),
    ),
    "a job waits for the slot of an ending session": (
        PoolState(1, (session(1, ending=True),), waiting=(small("a", 9),)),
        (),
    ),
    "a job waits while all sessions are busy": (PoolState(2, TWO, BUSY, (small("c"),)), ()),
    "a higher priority preempts the youngest job": (PoolState(2, TWO, BUSY, (small("c", 1),)), (Preempt("b", 1),)),
    "the lowest priority is preempted first": (
        PoolState(2, TWO, (running("a", "session-1", priority=-1), BUSY[1]), (small("c", 1),)),
        (Preempt("a", 1),),
    ),
    "one job is preempted per waiting job": (
        PoolState(2, TWO, BUSY, (small("c", 1), small("d", 1), small("e", 1))),
        (Preempt("b", 1), Preempt("a", 1)),
    ),
    "a stopping job is not preempted again": (
        PoolState(2, TWO, (BUSY[0], running("b", "session-2", started_at=2.0, stopping=True)), (small("c", 1),)),
        (),
    ),
    "an equal priority preempts no one": (PoolState(2, TWO, BUSY, (small("c", 0),)), ()),
    "a job without a held slot is not preempted": (
        PoolState(1, (), (running("a", "session-1"),), (small("b", 1),)),
        (StartSession("session-1"),),
    ),
    "a trainer and a session start": (
        PoolState(4, waiting=(large("a", 2), small("b"))),
        (StartTrainer("a", 2), StartSession("session-1")),
    ),
    "a trainer that runs is not started again": (PoolState(4, (trainer("a", 2),), waiting=(large("a", 2),)), ()),
    "a trainer larger than the pool gets all of it": (PoolState(2, waiting=(large("a", 8),)), (StartTrainer("a", 2),)),
    "idle sessions end for a trainer": (
        PoolState(2, TWO, waiting=(large("a", 2),)),
        (EndSession("session-2"), EndSession("session-1")),
    ),
    "a busy session of equal priority ends after its job": (
        PoolState(2, TWO, BUSY, (large("c", 1),)),
        (EndSession("session-2"),),
    ),
    "a busy session of lower priority ends at once": (
        PoolState(2, TWO, BUSY, (large("c", 1, 1),)),
        (Preempt("b", 1), EndSession("session-2")),
    ),
    "a busy session of higher priority does not end": (
        PoolState(1, (session(1),), (running("a", "session-1", priority=5),), (large("c", 1),)),
        (),
    ),
    "a trainer waits for slots that are free soon": (
        PoolState(2, (session(1, ending=True), session(2)), BUSY, (large("c", 1),)),
        (),
    ),
    "no small job overtakes a large one that waits": (
        PoolState(3, TWO, BUSY, (large("c", 2), small("d"))),
        (EndSession("session-2"),),
    ),
    "sessions start before jobs share one": (
        shared((session(1),), (), (small("a"), small("b"))),
        (StartSession("session-2"),),
    ),
    "jobs share sessions once each has one": (shared(TWO, BUSY, (small("c"), small("d"))), ()),
    "a full session's youngest job of the lowest priority is preempted": (
        shared(TWO, (*THREE_JOBS, running("d", "session-1", started_at=4.0)), (small("e", 1),)),
        (Preempt("d", 1),),
    ),
    "a job with a session for itself ends no other": (shared(TWO, BUSY, (small("c", alone=True),)), ()),
    "a job of a higher priority gets a session for itself": (
        shared(TWO, THREE_JOBS, (small("d", 1, alone=True),)),
        (Preempt("a", 1),),
    ),
    "a session for one job takes no other": (
        shared(TWO, (running("a", "session-1", alone=True), *THREE_JOBS[1:]), (small("d", 1),)),
        (Preempt("b", 1),),
    ),
    "all jobs of a session stop for a trainer": (
        shared(TWO, (*BUSY, running("c", "session-2", started_at=3.0)), (large("d", 1, 1),)),
        (Preempt("c", 1), Preempt("b", 1), EndSession("session-2")),
    ),
    "a session with a job of a higher priority does not end for a trainer": (
        shared(TWO, (running("a", "session-1", priority=2), *THREE_JOBS[1:]), (large("d", 1, 1),)),
        (EndSession("session-2"),),
    ),
    "a trainer does not wait for a job of a lower priority in an ending session": (
        PoolState(
            3,
            (session(1, True), trainer("b", 2)),
            (running("a", "session-1", started_at=1.0), running("b", "b")),
            (large("c", 2, 1),),
        ),
        (Preempt("a", 1), Preempt("b", 1)),
    ),
    "the slots of one trainer serve several jobs": (
        PoolState(2, (trainer("a", 2),), (running("a", "a"),), (small("b", 1), small("c", 1))),
        (Preempt("a", 1),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_decisions(case: str) -> None:
    pool, actions = CASES[case]
    assert decide(pool) == actions


@st.composite
def pools(draw: st.DrawFn) -> PoolState:
    size, per_session = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    priorities = st.integers(-1, 1)
    held: list[WorkerSlot] = []
    at_work: list[RunningJob] = []
    while sum(slot.size for slot in held) < size and draw(st.booleans()):
        left = size - sum(slot.size for slot in held)
        if draw(st.booleans()):
            held.append(session(len(held) + 1, draw(st.booleans())))
        else:
            held.append(trainer(f"t{len(held)}", draw(st.integers(1, left))))
        name = held[-1].name
        for number in range(draw(st.integers(0, per_session if is_session(held[-1]) else 1))):
            job = f"j{len(held)}.{number}" if is_session(held[-1]) else name
            fields = {
                "priority": draw(priorities),
                "started_at": draw(st.floats(0, 9)),
                "stopping": draw(st.booleans()),
            }
            at_work.append(running(job, name, **fields))
    jobs = draw(st.lists(st.tuples(priorities, st.integers(0, 8)), max_size=6))
    jobs.sort(key=lambda job: -job[0])
    waiting = [large(f"w{i}", n, p) if n else small(f"w{i}", p, draw(st.booleans())) for i, (p, n) in enumerate(jobs)]
    return PoolState(size, tuple(held), tuple(at_work), tuple(waiting), per_session)


@settings(max_examples=600)
@given(pools())
def test_actions_fit_the_pool_and_preempt_the_least_important(pool: PoolState) -> None:
    actions = decide(pool)
    started = [
        1 if isinstance(a, StartSession) else a.slot_count
        for a in actions
        if isinstance(a, StartSession | StartTrainer)
    ]
    assert sum(slot.size for slot in pool.held_slots) + sum(started) <= max(
        pool.slot_count, sum(p.size for p in pool.held_slots)
    )
    names = [a.name for a in actions if isinstance(a, StartSession)]
    assert len(set(names)) == len(names) and not set(names) & {slot.name for slot in pool.held_slots}
    at_work = {job.id: job for job in pool.running}
    preempted = [at_work[a.job] for a in actions if isinstance(a, Preempt)]
    assert len({job.id for job in preempted}) == len(preempted)
    for victim in preempted:
        assert not victim.stopping
        assert any(victim.priority < job.priority for job in pool.waiting)
        # No job that keeps running would have been a better choice, if sessions have one job each.
        if pool.per_session > 1:
            continue
        for spared in at_work.values():
            if spared not in preempted and not spared.stopping:
                assert (spared.priority, -spared.started_at) >= (victim.priority, -victim.started_at)
    ended = {a.name for a in actions if isinstance(a, EndSession)}
    assert ended <= {slot.name for slot in pool.held_slots if not slot.ending}
    if not pool.waiting:
        assert not actions


@settings(max_examples=300)
@given(pools())
def test_a_job_above_all_running_priorities_starts_eventually(pool: PoolState) -> None:
    assume(pool.waiting and all(job.priority < pool.waiting[0].priority for job in pool.running))
    first = pool.waiting[0]
    for _ in range(5):
        actions = decide(pool)
        if first.executor == "session" and (
            has_place(pool, first) or any(isinstance(action, StartSession) for action in actions)
        ):
            return
        if any(isinstance(action, StartTrainer) and action.job == first.id for action in actions):
            return
        pool = after(pool, actions)
    pytest.fail(f"{first} never starts: {pool}")


def has_place(pool: PoolState, waiting: WaitingJob) -> bool:
    """Whether a session can take the job now."""
    counts = Counter(job.worker_slot for job in pool.running)
    most = 1 if waiting.alone else pool.per_session
    return any(is_session(slot) and not slot.ending and counts[slot.name] < most for slot in pool.held_slots)


def is_session(slot: WorkerSlot) -> bool:
    return slot.name.startswith("session-")


def after(pool: PoolState, actions: tuple[Action, ...]) -> PoolState:
    """The pool once everything that should stop has stopped."""
    ending = {slot.name for slot in pool.held_slots if slot.ending or EndSession(slot.name) in actions}
    left = tuple(
        job
        for job in pool.running
        if not job.stopping and job.worker_slot not in ending and Preempt(job.id, job.attempt) not in actions
    )
    busy = {job.worker_slot for job in left}
    held = tuple(p for p in pool.held_slots if p.name not in ending and (is_session(p) or p.name in busy))
    return PoolState(pool.slot_count, held, left, pool.waiting, pool.per_session)
