"""What the supervisor decides."""

from __future__ import annotations

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


def running(job: str, place: str, **fields: Any) -> RunningJob:
    return RunningJob(**{"id": job, "attempt": 1, "priority": 0, "started_at": 0.0, "place": place} | fields)


def small(job: str, priority: int = 0) -> WaitingJob:
    return WaitingJob(job, "session", priority)


def large(job: str, size: int, priority: int = 0) -> WaitingJob:
    return WaitingJob(job, "dedicated", priority, size)


BUSY = (running("a", "session-1", started_at=1.0), running("b", "session-2", started_at=2.0))
TWO = (session(1), session(2))

CASES: dict[str, tuple[PoolState, tuple[Action, ...]]] = {
    "nothing waits": (PoolState(2), ()),
    "nothing waits, and a session is idle": (PoolState(2, TWO), ()),
    "a session a job": (
        PoolState(4, waiting=(small("a"), small("b"))),
        (StartSession("session-1"), StartSession("session-2")),
    ),
    "no more than there are places": (
        PoolState(2, waiting=(small("a"), small("b"), small("c"))),
        (StartSession("session-1"), StartSession("session-2")),
    ),
    "an idle session takes it": (PoolState(2, (session(2),), waiting=(small("a"),)), ()),
    "a free name": (
        PoolState(2, (session(2),), waiting=(small("a"), small("b"))),
        (StartSession("session-1"),),
    ),
    "an ending session takes nothing, and its place is awaited": (
        PoolState(1, (session(1, ending=True),), waiting=(small("a", 9),)),
        (),
    ),
    "all busy": (PoolState(2, TWO, BUSY, (small("c"),)), ()),
    "a higher priority takes the youngest's place": (PoolState(2, TWO, BUSY, (small("c", 1),)), (Preempt("b", 1),)),
    "of the lowest priority first": (
        PoolState(2, TWO, (running("a", "session-1", priority=-1), BUSY[1]), (small("c", 1),)),
        (Preempt("a", 1),),
    ),
    "one for each that waits": (
        PoolState(2, TWO, BUSY, (small("c", 1), small("d", 1), small("e", 1))),
        (Preempt("b", 1), Preempt("a", 1)),
    ),
    "who stops already is not asked again": (
        PoolState(2, TWO, (BUSY[0], running("b", "session-2", started_at=2.0, stopping=True)), (small("c", 1),)),
        (),
    ),
    "an equal priority waits": (PoolState(2, TWO, BUSY, (small("c", 0),)), ()),
    "a job whose worker is gone has no place to give": (
        PoolState(1, (), (running("a", "session-1"),), (small("b", 1),)),
        (StartSession("session-1"),),
    ),
    "a trainer": (PoolState(4, waiting=(large("a", 2), small("b"))), (StartTrainer("a", 2), StartSession("session-1"))),
    "a trainer that is there already": (PoolState(4, (trainer("a", 2),), waiting=(large("a", 2),)), ()),
    "a trainer larger than the pool gets all of it": (PoolState(2, waiting=(large("a", 8),)), (StartTrainer("a", 2),)),
    "idle sessions make room": (
        PoolState(2, TWO, waiting=(large("a", 2),)),
        (EndSession("session-2"), EndSession("session-1")),
    ),
    "busy ones of no higher priority, after their jobs": (
        PoolState(2, TWO, BUSY, (large("c", 1),)),
        (EndSession("session-2"),),
    ),
    "and of a lower one at once": (
        PoolState(2, TWO, BUSY, (large("c", 1, 1),)),
        (Preempt("b", 1), EndSession("session-2")),
    ),
    "not those of a higher one": (
        PoolState(1, (session(1),), (running("a", "session-1", priority=5),), (large("c", 1),)),
        (),
    ),
    "room that is coming is awaited": (
        PoolState(2, (session(1, ending=True), session(2)), BUSY, (large("c", 1),)),
        (),
    ),
    "nothing passes a large job that waits": (
        PoolState(3, TWO, BUSY, (large("c", 2), small("d"))),
        (EndSession("session-2"),),
    ),
    "a trainer's places serve several": (
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
    size = draw(st.integers(1, 6))
    priorities = st.integers(-1, 1)
    held: list[WorkerSlot] = []
    at_work: list[RunningJob] = []
    while sum(place.size for place in held) < size and draw(st.booleans()):
        left = size - sum(place.size for place in held)
        if draw(st.booleans()):
            held.append(session(len(held) + 1, draw(st.booleans())))
        else:
            held.append(trainer(f"t{len(held)}", draw(st.integers(1, left))))
        if draw(st.booleans()):
            name = held[-1].name
            job = name if name.startswith("t") else f"j{len(held)}"
            fields = {
                "priority": draw(priorities),
                "started_at": draw(st.floats(0, 9)),
                "stopping": draw(st.booleans()),
            }
            at_work.append(running(job, name, **fields))
    jobs = draw(st.lists(st.tuples(priorities, st.integers(0, 8)), max_size=6))
    jobs.sort(key=lambda job: -job[0])
    waiting = [large(f"w{i}", n, p) if n else small(f"w{i}", p) for i, (p, n) in enumerate(jobs)]
    return PoolState(size, tuple(held), tuple(at_work), tuple(waiting))


@settings(max_examples=600, deadline=None)
@given(pools())
def test_whatever_there_is(pool: PoolState) -> None:
    actions = decide(pool)
    started = [
        1 if isinstance(a, StartSession) else a.slot_count
        for a in actions
        if isinstance(a, StartSession | StartTrainer)
    ]
    assert sum(place.size for place in pool.held_slots) + sum(started) <= max(
        pool.slot_count, sum(p.size for p in pool.held_slots)
    )
    names = [a.name for a in actions if isinstance(a, StartSession)]
    assert len(set(names)) == len(names) and not set(names) & {place.name for place in pool.held_slots}
    at_work = {job.id: job for job in pool.running}
    preempted = [at_work[a.job] for a in actions if isinstance(a, Preempt)]
    assert len({job.id for job in preempted}) == len(preempted)
    for victim in preempted:
        assert not victim.stopping
        assert any(victim.priority < job.priority for job in pool.waiting)
        # Whoever is spared is no worse a victim.
        for spared in at_work.values():
            if spared not in preempted and not spared.stopping:
                assert (spared.priority, -spared.started_at) >= (victim.priority, -victim.started_at)
    ended = {a.name for a in actions if isinstance(a, EndSession)}
    assert ended <= {place.name for place in pool.held_slots if not place.ending}
    if not pool.waiting:
        assert not actions


@settings(max_examples=300, deadline=None)
@given(pools())
def test_what_outranks_everything_starts_in_the_end(pool: PoolState) -> None:
    assume(pool.waiting and all(job.priority < pool.waiting[0].priority for job in pool.running))
    first = pool.waiting[0]
    for _ in range(5):
        actions = decide(pool)
        busy = {job.worker_slot for job in pool.running}
        idle = [place for place in pool.held_slots if is_session(place) and not place.ending and place.name not in busy]
        if first.executor == "session" and (idle or any(isinstance(action, StartSession) for action in actions)):
            return
        if any(isinstance(action, StartTrainer) and action.job == first.id for action in actions):
            return
        pool = carried_out(pool, actions)
    pytest.fail(f"{first} never starts: {pool}")


def is_session(place: WorkerSlot) -> bool:
    return place.name.startswith("session-")


def carried_out(pool: PoolState, actions: tuple[Action, ...]) -> PoolState:
    """The pool when all that was asked to stop has stopped."""
    ending = {place.name for place in pool.held_slots if place.ending or EndSession(place.name) in actions}
    left = tuple(
        job
        for job in pool.running
        if not job.stopping and job.worker_slot not in ending and Preempt(job.id, job.attempt) not in actions
    )
    busy = {job.worker_slot for job in left}
    held = tuple(p for p in pool.held_slots if p.name not in ending and (is_session(p) or p.name in busy))
    return PoolState(pool.slot_count, held, left, pool.waiting)
