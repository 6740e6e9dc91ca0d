"""Leases of nightly runs and scheduled times, on both databases."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from loramill.errors import LeaseLost, NightlyBusy
from loramill.registry import nightly, nightly_schedule
from loramill.types import ScheduledTime

DUE = ScheduledTime(scheduled_at=1000.0, schedule="0 2 * * * UTC", missed=2)


def lease(registry, holder, now, **kwargs):
    with registry.writing() as session:
        return nightly_schedule.lease_run(session, holder, now=now, seconds=60, **kwargs)


def test_one_process_at_a_time_works_on_a_run(registry):
    run = lease(registry, "one", 0.0)
    assert (run.holder, run.lease_until) == ("one", 60.0)
    with pytest.raises(NightlyBusy, match=f"{run.id} is being worked on by one"):
        lease(registry, "two", 59.0)
    with registry.writing() as session:
        nightly_schedule.extend_lease(session, run.id, "one", now=59.0, seconds=60)
    with pytest.raises(NightlyBusy):
        lease(registry, "two", 100.0)


def test_a_dead_process_is_taken_over_when_its_lease_ended(registry):
    run = lease(registry, "one", 0.0)
    assert lease(registry, "two", 61.0).id == run.id
    with registry.writing() as session:
        nightly_schedule.extend_lease(session, run.id, "two", now=62.0, seconds=60)
        with pytest.raises(LeaseLost, match="has taken over the nightly run"):
            nightly_schedule.extend_lease(session, run.id, "one", now=62.0, seconds=60)
        nightly_schedule.end_lease(session, run.id, "one")  # changes nothing
    with pytest.raises(NightlyBusy):
        lease(registry, "one", 63.0)


def test_a_process_known_to_be_dead_is_taken_over_at_once(registry):
    run = lease(registry, "one", 0.0)
    assert lease(registry, "two", 1.0, dead_holder="one").holder == "two"
    with registry.writing() as session:
        nightly_schedule.end_lease(session, run.id, "two")
    assert lease(registry, "three", 2.0).id == run.id
    with registry.writing() as session:
        nightly.finish_run(session, run.id)
    assert lease(registry, "four", 3.0).id != run.id


def test_processes_that_start_at_once_make_one_run(registry):
    def start(number):
        try:
            return lease(registry, f"process {number}", 0.0).holder
        except NightlyBusy:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(start, range(8)))
    assert sum(each is not None for each in found) == 1
    with registry.reading() as session:
        assert len(nightly.list_runs(session)) == 1


def test_schedulers_that_see_one_time_make_one_run(registry):
    def claim(_):
        with registry.writing() as session:
            return nightly_schedule.claim_time(session, DUE, 1000.0)

    with ThreadPoolExecutor(8) as pool:
        found = [run for run in pool.map(claim, range(8)) if run is not None]
    assert len(found) == 1
    with registry.reading() as session:
        assert [run.id for run in nightly.list_runs(session)] == [found[0].id]
        assert nightly_schedule.list_times(session, found[0].id) == [DUE.model_copy(update={"run": found[0].id})]


def test_a_run_that_is_open_stands_for_a_later_time(registry):
    run = lease(registry, "one", 0.0)
    with registry.writing() as session:
        assert nightly_schedule.claim_time(session, DUE, 1000.0).id == run.id


def test_the_state_of_the_schedule_follows_its_rows(registry):
    def state(now):
        with registry.reading() as session:
            return nightly_schedule.schedule_state(session, now)

    assert state(0.0) == nightly_schedule.ScheduleState(None, None, resumable=False)
    with registry.writing() as session:
        nightly_schedule.begin_schedule(session, DUE.schedule, 500.0)
        nightly_schedule.begin_schedule(session, DUE.schedule, 500.0)
    assert state(600.0).last_time == ScheduledTime(scheduled_at=500.0, schedule=DUE.schedule)
    with registry.writing() as session:
        run = nightly_schedule.claim_time(session, DUE, 1000.0)
    assert state(1000.0).resumable and state(1000.0).last_run.id == run.id
    lease(registry, "one", 1000.0)
    assert not state(1030.0).resumable and state(1061.0).resumable
    with registry.writing() as session:
        nightly.finish_run(session, run.id)
    assert not state(2000.0).resumable
    lease(registry, "by hand", 2000.0)
    assert not state(3000.0).resumable  # the schedule did not begin it
