"""Regressions in the engine's state: hangs, leaks and wrong reports."""

import threading
import weakref

import pytest

from loramill.errors import EngineFault, Unavailable
from loramill.serve.engine import FinishReason
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.scheduling.scheduler import Scheduler
from loramill.serve.engine.scheduling.sequence import RunningSequence


def always(version: str | None) -> bool:
    return True


def run(s: Scheduler, ready=always):
    """One step as the engine runs it: each sampled sequence gets a token."""
    plan = s.schedule(ready)
    s.commit(plan)
    for chunk in plan.chunks:
        if chunk.sampled:
            s.get(chunk.id).tokens.append(7)
    s.check_integrity()
    return plan


def test_a_rank_starved_sequence_without_slot_blocks_no_one():
    s = Scheduler(100, 4, 100, 10, rank_budget=30, rank_of=lambda version: 16)
    s.add(RunningSequence("v", "t", "v", [1]))
    run(s)
    s.add(RunningSequence("w", "u", "w", [2]))
    for _ in range(100):
        run(s)
    s.add(RunningSequence("x", "u", "x", [3]))
    s.remove("v")
    # Its version waits for a slot, and all slots may be held for sequences that it would block.
    assert run(s, lambda version: version != "w").admitted == ("x",)


def test_the_patience_of_an_admitted_sequence_restarts():
    s = Scheduler(4, 4, 100, 10, rank_budget=30, rank_of=lambda version: 16)
    s.add(RunningSequence("v", "t", "v", [1]))
    run(s)
    s.add(RunningSequence("w", "u", "w", [2]))
    run(s)
    assert s.get("w").rank_blocked_since is not None
    s.remove("v")
    assert run(s).admitted == ("w",)
    assert s.get("w").rank_blocked_since is None


def test_a_prefix_computed_at_lower_priority_is_not_waited_for():
    s = Scheduler(100, 4, 4, 10)
    tokens = list(range(40))
    s.add(RunningSequence("low", "t", None, list(tokens)))
    run(s)
    s.add(RunningSequence("first", "u", None, [100 + i for i in range(8)], priority=1))
    s.add(RunningSequence("alike", "u", None, list(tokens), priority=1))
    for number in range(20):
        s.add(RunningSequence(f"other {number}", "u", None, [1000 * number + i for i in range(8)], priority=1))
    admitted = [id_ for _ in range(6) for id_ in run(s).admitted]
    assert admitted[:2] == ["first", "alike"]


def test_an_adapter_as_large_as_two_others_gets_their_room():
    residency = Residency(slots=3, patience_steps=3)
    for version in ("a", "b"):
        for _ in range(2):
            residency.acquire(version)
        residency.advance()
        residency.mark_loaded(version)
        residency.begin_use(version)
    residency.acquire("large")
    assert residency.advance().load == ("large",)
    residency.advance(awaiting_memory=1)
    assert not residency.ready("a") and residency.ready("b")
    residency.end_use("a")
    # The memory that "a" frees is not enough.
    residency.advance(awaiting_memory=1)
    assert residency.idle == ("a",) and not residency.ready("b")
    residency.end_use("b")
    assert set(residency.idle) == {"a", "b"}
    residency.advance()
    assert residency.ready("a") and residency.ready("b")


def fail(driver, monkeypatch) -> None:
    """A step that fails outside the model."""
    with monkeypatch.context() as patch:
        # Not a Python function: pytest keeps log records, and with them everything that a failing frame references.
        patch.setattr(Scheduler, "schedule", staticmethod(int))
        driver.step()


def test_a_reset_drops_the_old_cache_and_slab_before_it_allocates_new_ones(drive, monkeypatch):
    driver = drive()
    engine = driver.engine
    # Work that the side threads have begun holds the slab until it ends.
    engine._adapters._loader._releaser.submit(lambda: None).result()
    old = [weakref.ref(engine._adapters.slab), *(weakref.ref(kv.keys) for kv in engine._runner._cache)]
    # On a GPU, its memory is page-locked.
    old.append(weakref.ref(engine._adapters._cache))
    left: list[list[bool]] = []
    kind = type(engine._model)

    def watched(make):
        def made(*args):
            left.append([reference() is not None for reference in old])
            return make(*args)

        return made

    for name in ("new_cache", "new_slab"):
        monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
    driver.submit("a", [1])
    fail(driver, monkeypatch)
    assert isinstance(driver.answers["a"].last.error, EngineFault)
    assert len(left) == 2 and not any(map(any, left))


def test_a_fetch_that_is_under_way_at_a_reset_is_no_fault_of_the_adapter(drive, adapters, monkeypatch, caplog):
    begun, gate = threading.Event(), threading.Event()

    def source(version):
        begun.set()
        assert gate.wait(60)
        return adapters[version]

    driver = drive(source)
    driver.submit("a", [1], "lora")
    driver.step()
    assert begun.wait(60)
    loader = driver.engine._adapters._loader
    fail(driver, monkeypatch)
    gate.set()
    loader.close(wait=True)
    assert "a step failed" in caplog.text and "adapter not loaded" not in caplog.text


def test_an_engine_that_cannot_be_reset_is_closed(drive, monkeypatch):
    driver = drive()
    monkeypatch.setattr(type(driver.engine._model), "new_cache", lambda *args: 1 / 0)
    driver.submit("a", [1])
    with pytest.raises(ZeroDivisionError):
        fail(driver, monkeypatch)
    with pytest.raises(Unavailable):
        driver.submit("b", [1])
    driver.engine.close()


def test_counters_since_the_start_survive_a_failing_step(drive, monkeypatch, prompts):
    driver = drive()
    for _ in range(2):
        driver.submit("a", prompts["all"], "all")
        driver.finish()
    before = driver.engine.stats
    assert before.loads == 1 and before.reused_tokens > 0
    fail(driver, monkeypatch)
    after = driver.engine.stats
    assert (after.loads, after.reused_tokens) == (before.loads, before.reused_tokens)
    driver.submit("b", prompts["all"], "all")
    driver.finish()
    assert driver.engine.stats.loads == 2


def test_a_closed_engine_has_no_work_and_starts_none(drive, prompts):
    # Threads of an engine that was reset, which ends without waiting for them, may still be ending.
    threads = set(threading.enumerate())
    driver = drive()
    driver.submit("running", prompts[None], max_tokens=50)
    driver.step()
    driver.submit("cold", prompts["lora"], "lora")
    driver.engine.close()
    assert not driver.engine.has_work
    assert not driver.engine.wait(0.01)
    assert driver.engine.step() == []
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("adapter-")]


def test_closing_waits_for_the_step_under_way(drive, monkeypatch):
    driver = drive()
    begun, go = threading.Event(), threading.Event()
    plan = driver.engine._scheduler.schedule

    def slowly(ready):
        begun.set()
        assert go.wait(20)
        return plan(ready)

    monkeypatch.setattr(driver.engine._scheduler, "schedule", slowly)
    driver.submit("a", [1])
    stepping = threading.Thread(target=driver.step)
    closing = threading.Thread(target=driver.engine.close)
    stepping.start()
    assert begun.wait(20)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go.set()
    for thread in (stepping, closing):
        thread.join(20)
    assert len(driver.answers["a"].tokens) == 1


def test_some_of_n_answers_have_ended_when_the_rest_is_cancelled(drive, prompts, expected):
    driver = drive()
    prompt, tokens = prompts[None], expected["None"]
    # One of the seeds meets its stop token early.
    driver.submit("it", prompt, n=3, temperature=1.0, seed=3, max_tokens=100, stop_ids=tuple(range(0, 101, 9)))
    while all(answer.last is None for answer in driver.answers.values()):
        driver.step()
    driver.engine.cancel("it")
    driver.finish()
    finishes = [answer.last.finish_reason for answer in driver.answers.values()]
    assert set(finishes) == {FinishReason.STOP, FinishReason.CANCELLED}
    driver.answers.clear()
    driver.submit("it", prompt)
    assert driver.finish()["it"] == tokens


def test_large_adapters_that_wait_for_memory_do_not_block_small_ones(drive, adapters, prompts, expected, monkeypatch):
    # "all" is nearly eight times as large as "lora", and there is room for one of it.
    driver = drive(lambda version: adapters[version.split()[0]], adapter_bytes=31_488 + 4096, slot_patience_steps=1000)
    driver.submit("busy", prompts["all"], "all", max_tokens=150)
    while not driver.answers["busy"].tokens:
        assert driver.engine.wait(20)
        driver.step()
    # Each result of the loader's threads gets one step: a slow thread must not give "busy" the time to end.
    loader, results = driver.engine._adapters._loader, threading.Semaphore(0)
    notify = loader._notify
    monkeypatch.setattr(loader, "_notify", lambda: (notify(), results.release()))
    for number in range(4):
        driver.submit(f"large {number}", prompts["all"], f"all {number}", max_tokens=1)
    driver.submit("lora", prompts["lora"], "lora")
    driver.step()
    while not driver.answers["lora"].tokens:
        assert results.acquire(timeout=60), "large adapters keep the small one from being read"
        driver.step()
    while driver.answers["lora"].last is None:
        driver.step()
    assert driver.answers["busy"].last is None
    assert driver.answers["lora"].tokens == expected["lora"]
    driver.finish()
