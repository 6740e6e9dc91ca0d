"""Residency: cases, and random request sequences."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.serve.engine.adapters.residency import Residency, SlotChanges


def use(residency: Residency, version: str) -> None:
    """One request, from arrival to end, for a version that gets a slot at once."""
    residency.acquire(version)
    assert version in residency.advance().load
    residency.mark_loaded(version)
    residency.begin_use(version)
    residency.end_use(version)
    residency.release(version)


def test_a_version_stays_until_its_slot_is_needed_least_recent_first():
    residency = Residency(slots=2, patience_steps=10)
    use(residency, "a")
    use(residency, "b")
    residency.acquire("a")
    assert residency.advance() == SlotChanges((), ())
    assert residency.ready("a")
    residency.begin_use("a")
    residency.end_use("a")
    residency.release("a")
    residency.acquire("c")
    assert residency.advance() == SlotChanges(("b",), ("c",))
    assert residency.resident == ("a",)
    assert residency.loading == ("c",)


def test_versions_with_requests_are_not_evicted_and_others_wait_in_order():
    residency = Residency(slots=1, patience_steps=10)
    residency.acquire("a")
    residency.advance()
    residency.acquire("b")
    residency.advance()
    residency.acquire("c")
    residency.mark_loaded("a")
    assert residency.advance() == SlotChanges((), ())
    residency.release("a")
    assert residency.advance() == SlotChanges(("a",), ("b",))


def test_the_least_recently_used_drains_for_one_that_waited_too_long():
    residency = Residency(slots=2, patience_steps=3)
    for version in ("a", "b"):
        residency.acquire(version)
        residency.advance()
        residency.mark_loaded(version)
        residency.begin_use(version)
    residency.acquire("c")
    for _ in range(3):
        residency.advance()
        assert residency.ready("a") and residency.ready("b")
    residency.advance()
    assert not residency.ready("a") and residency.ready("b")
    residency.end_use("a")
    assert residency.advance() == SlotChanges(("a",), ("c",))
    assert residency.ready("b")


def test_draining_ends_when_no_version_waits():
    residency = Residency(slots=1, patience_steps=1)
    residency.acquire("a")
    residency.advance()
    residency.mark_loaded("a")
    residency.begin_use("a")
    residency.acquire("b")
    for _ in range(3):
        residency.advance()
    assert not residency.ready("a")
    residency.release("b")
    residency.advance()
    assert residency.ready("a")


def test_a_failed_fetch_frees_the_slot_and_may_be_retried():
    residency = Residency(slots=1, patience_steps=1)
    residency.acquire("a")
    residency.advance()
    residency.mark_failed("a")
    residency.release("a")
    residency.acquire("b")
    residency.acquire("a")
    assert residency.advance().load in (("a",), ("b",))
    residency.check_integrity({"a": 1, "b": 1}, {})
    with pytest.raises(EngineFault, match="live"):
        residency.check_integrity({"a": 1}, {})
    with pytest.raises(EngineFault, match="running"):
        residency.check_integrity({"a": 1, "b": 1}, {"a": 1})


@settings(max_examples=150)
@given(
    slots=st.integers(1, 3),
    patience=st.integers(1, 5),
    requests=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 20), st.integers(1, 6)), max_size=25),
    delay=st.integers(0, 4),
)
def test_every_request_is_served_eventually(slots, patience, requests, delay):
    residency = Residency(slots, patience)
    waiting: list[tuple[str, int]] = []
    running: list[list] = []
    held: set[str] = set()
    due: dict[str, int] = {}
    served = 0
    for step in range(800):
        for version, when, steps in requests:
            if when == step:
                residency.acquire(version)
                waiting.append((version, steps))
        moves = residency.advance()
        assert not set(moves.evict) & {version for version, _ in running}, "evicted in use"
        held = held - set(moves.evict) | set(moves.load)
        assert len(held) <= slots
        due.update(dict.fromkeys(moves.load, step + delay))
        for version in residency.loading:
            if due[version] == step:
                residency.mark_loaded(version)
        for version, steps in [request for request in waiting if residency.ready(request[0])]:
            waiting.remove((version, steps))
            residency.begin_use(version)
            running.append([version, steps])
        for item in running:
            item[1] -= 1
        for version, _ in [item for item in running if item[1] == 0]:
            residency.end_use(version)
            residency.release(version)
            served += 1
        running = [item for item in running if item[1]]
        if served == len(requests):
            break
    assert served == len(requests)
