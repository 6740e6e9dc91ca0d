"""The durations and counters that the engine reports."""

from .conftest import LARGEST


def test_each_wait_step_and_load_is_timed_once(drive, prompts, expected):
    driver = drive(kv_tokens=160, max_batch_tokens=40)
    driver.warm(*prompts)
    driver.submit_all(prompts)
    assert driver.finish() == expected
    stats = driver.engine.stats
    assert stats.preemptions > 0, "a preempted answer must not be counted again"
    assert sum(stats.queue_times.counts) == 2 * len(prompts)
    assert sum(stats.step_times.counts) == stats.steps > 0
    assert sum(stats.load_times.counts) == stats.loads == 6
    assert all(each.total_seconds > 0 for each in (stats.queue_times, stats.step_times, stats.load_times))


def test_evictions(drive):
    driver = drive(adapter_slots=1)
    for number, version in enumerate(("lora", "all", "lora"), start=1):
        driver.submit(str(number), [1, 2], version, max_tokens=1)
        driver.finish()
        stats = driver.engine.stats
        assert (stats.slots, stats.loads, stats.evictions) == (1, number, number - 1)


def test_evictions_for_lack_of_memory(drive):
    driver = drive(adapter_slots=4, adapter_bytes=LARGEST)
    for version in ("all", "patterns"):
        driver.submit(version, [1, 2], version, max_tokens=1)
        driver.finish()
    assert driver.engine.stats.evictions == 1


def test_a_failed_load_is_not_timed_and_can_be_tried_again(drive):
    driver = drive()
    for number in (1, 2):
        driver.submit(str(number), [1], "nothing")
        driver.finish()
        assert driver.engine.stats.load_failures == number
    assert sum(driver.engine.stats.load_times.counts) == 0


def test_counters_survive_a_fault(drive, monkeypatch):
    driver = drive(adapter_slots=1)
    for version in ("lora", "all"):
        driver.submit(version, [1], version, max_tokens=1)
        driver.finish()
    before = driver.engine.stats
    monkeypatch.setattr(driver.engine._scheduler, "schedule", lambda ready: 1 / 0)
    driver.submit("fault", [1])
    driver.finish()
    after = driver.engine.stats
    assert before.evictions == after.evictions == 1
    assert (after.queue_times, after.load_times) == (before.queue_times, before.load_times)
