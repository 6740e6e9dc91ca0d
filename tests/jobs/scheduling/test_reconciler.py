"""The supervisor without Ray: what it starts, alone and together with a second supervisor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramill.errors import Unavailable
from loramill.jobs.scheduling import reconciler as reconciler_module
from loramill.jobs.scheduling.reconciler import Reconciler, may_take_another, worker_name
from loramill.registry import Registry, datasets, jobs, tenants
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings
from loramill.types import Executor, JobRecord, JobSpec, JobStatus

from ...databases import create_sqlite_database
from ...waiting import eventually


class Runs:
    """Sessions and trainers that do nothing until `ended` is set."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended = threading.Event()

    def session(self, name: str, holder: str) -> None:
        self.started.append(name)
        self.ended.wait()

    def trainer(self, job: str, gpus: int) -> None:
        self.started.append(f"{job} on {gpus}")
        self.ended.wait()


@pytest.fixture(autouse=True)
def no_slot_expires_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler_module, "SLOT_LEASE_SECONDS", 600.0)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        tenants.create(session, "acme")
        datasets.create(session, "acme", "train.jsonl", "d" * 64, 10, 10)
    yield registry
    registry.close()


@pytest.fixture
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.ended.set()


@pytest.fixture
def make(registry: Registry, runs: Runs) -> Callable[..., Reconciler]:
    def make(**fields: object) -> Reconciler:
        settings = JobSettings.model_validate({"sessions": 3, "max_attempts": 2} | fields)
        return Reconciler(registry, settings, run_session=runs.session, run_trainer=runs.trainer)

    return make


def submit(registry: Registry, count: int = 1, executor: Executor = "session", **fields: object) -> list[JobRecord]:
    with registry.writing() as session:
        (data,) = datasets.list_datasets(session, "acme")
        defaults = {"base": "b" * 64, "adapter": "acme/bot", "train": data.id, "steps": 5, "batch_size": 2}
        priority = int(str(fields.pop("priority", 0)))
        spec = JobSpec.model_validate(defaults | fields)
        return [jobs.submit(session, spec, {}, executor=executor, priority=priority) for _ in range(count)]


def lease(registry: Registry, slot: str, now: float | None = None) -> JobRecord | None:
    with registry.writing() as session:
        owner = reconciler_module.worker_name(slot, 1)
        return jobs.lease(session, owner, now=now or time.time(), seconds=60, max_attempts=2)


def test_sessions_start_as_jobs_arrive_up_to_the_number_of_slots(registry, make, runs):
    reconciler = make()
    reconciler.reconcile()
    assert reconciler.active_slots == []
    submit(registry, 2)
    reconciler.reconcile()
    reconciler.reconcile()
    assert reconciler.active_slots == ["session-1", "session-2"]
    submit(registry, 5)
    reconciler.reconcile()
    assert reconciler.active_slots == ["session-1", "session-2", "session-3"]
    eventually(lambda: sorted(runs.started) == reconciler.active_slots)
    runs.ended.set()
    eventually(lambda: not reconciler.active_slots)
    runs.ended.clear()
    reconciler.reconcile()
    assert reconciler.active_slots == ["session-1", "session-2", "session-3"]


def test_two_supervisors_start_nothing_twice(registry, make, runs):
    first, second = make(), make()
    submit(registry, 9)
    (dedicated,) = submit(registry, executor="dedicated", priority=1, gpus=2)

    def reconcile_thrice(reconciler: Reconciler) -> None:
        for _ in range(3):
            reconciler.reconcile()

    threads = [threading.Thread(target=reconcile_thrice, args=(reconciler,)) for reconciler in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(first.active_slots + second.active_slots) == sorted({*first.active_slots, *second.active_slots})
    eventually(lambda: sorted(runs.started) == [f"{dedicated.id} on 2", "session-1"])


def test_slots_of_a_vanished_supervisor_become_free(registry, make, runs, monkeypatch):
    first, second = make(), make()
    submit(registry, 3)
    first.reconcile()
    second.reconcile()
    assert len(first.active_slots) == 3 and second.active_slots == []
    now = time.time()
    monkeypatch.setattr(reconciler_module.time, "time", lambda: now + reconciler_module.SLOT_LEASE_SECONDS + 1)
    second.reconcile()
    assert len(second.active_slots) == 3
    with registry.reading() as session:
        assert not worker_slots.is_open(session, "session-1", first.holder)  # its session reads this and ends
        assert worker_slots.is_open(session, "session-1", second.holder)


def test_a_high_priority_job_gets_the_slot_of_a_low_one(registry, make):
    reconciler = make(sessions=1, per_session=1)
    (low,) = submit(registry)
    reconciler.reconcile()
    assert lease(registry, "session-1").id == low.id
    (high,) = submit(registry, priority=1)
    reconciler.reconcile()
    reconciler.reconcile()
    with registry.writing() as session:
        assert jobs.get(session, low.id).pending_action == "preempt"
        jobs.release(session, low.id, 1)
    assert lease(registry, "session-1").id == high.id
    reconciler.reconcile()
    assert reconciler.active_slots == ["session-1"]


def test_a_session_ends_to_free_its_slot_for_a_trainer(registry, make, runs):
    reconciler = make(sessions=1)
    submit(registry)
    reconciler.reconcile()
    running = lease(registry, "session-1")
    (large,) = submit(registry, executor="dedicated", priority=1)
    reconciler.reconcile()
    with registry.writing() as session:
        assert not worker_slots.is_open(session, "session-1", reconciler.holder)
        assert jobs.get(session, running.id).pending_action == "preempt"
        jobs.release(session, running.id, 1)
    runs.ended.set()
    eventually(lambda: not reconciler.active_slots)
    runs.ended.clear()
    reconciler.reconcile()
    assert reconciler.active_slots == [large.id]


def test_a_job_whose_lease_ran_out_is_queued_again(registry, make):
    (job,) = submit(registry)
    lease(registry, "session-1", now=1000.0)
    make().reconcile()
    with registry.reading() as session:
        assert jobs.get(session, job.id).status is JobStatus.QUEUED


def test_a_session_that_fails_at_once_keeps_its_slot_for_a_while(registry, make, runs, monkeypatch):
    reconciler = make()
    monkeypatch.setattr(runs, "session", None)
    failing = Reconciler(registry, JobSettings(sessions=1), run_session=fail, run_trainer=runs.trainer)
    submit(registry)
    failing.reconcile()
    reconciler.reconcile()
    assert failing.active_slots == ["session-1"]


def test_the_job_history_contains_why_its_trainer_ended(registry):
    (job,) = submit(registry, executor="dedicated", gpus=2)
    reconciler = Reconciler(registry, JobSettings(sessions=2), run_session=fail, run_trainer=fail)
    reconciler.reconcile()

    def messages() -> list[str]:
        with registry.reading() as session:
            return [event.message for event in jobs.list_events(session, job.id)]

    eventually(lambda: "Its trainer ended: no GPU" in messages())


def fail(name: str, holder: object) -> None:
    raise RuntimeError("no GPU")


def test_a_session_takes_another_job_if_no_other_has_fewer(registry, make, runs):
    submit(registry, 4)
    make(sessions=2, per_session=4).reconcile()

    def lease(slot: str) -> JobRecord:
        with registry.writing() as session:
            return jobs.lease(session, worker_name(slot, 1), now=time.time(), seconds=60, max_attempts=3)

    def turns() -> list[bool]:
        with registry.reading() as session:
            return [may_take_another(session, f"session-{number}", time.time()) for number in (1, 2)]

    assert turns() == [True, True]
    lease("session-1")
    assert turns() == [False, True]
    lease("session-2")
    assert turns() == [True, True]
    with registry.writing() as session:
        worker_slots.request_end(session, "session-2")
    lease("session-1")
    assert turns()[0]


def test_reconciling_continues_after_errors(registry, make, monkeypatch):
    monkeypatch.setattr(reconciler_module, "OUTAGE_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(reconciler_module, "POLL_SECONDS", 0.05)
    reconciler, ended, calls = make(), threading.Event(), []

    def reconcile() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise Unavailable("away")
        ended.set()

    monkeypatch.setattr(reconciler, "reconcile", reconcile)
    reconciler.run(ended)
    assert len(calls) == 3


def test_after_an_outage_workers_have_time_to_report(registry, make, monkeypatch):
    monkeypatch.setattr(reconciler_module, "OUTAGE_PAUSE_SECONDS", 0.0)
    reconciler, ended, calls, real = make(lease_seconds=60), threading.Event(), [], Reconciler.reconcile
    (job,) = submit(registry)
    lease(registry, "session-1", now=time.time() - 100)

    def status() -> JobStatus:
        with registry.reading() as session:
            return jobs.get(session, job.id).status

    def away_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Unavailable("away")
        real(reconciler)
        ended.set()

    monkeypatch.setattr(reconciler, "reconcile", away_once)
    reconciler.run(ended)
    assert len(calls) == 2 and status() is JobStatus.RUNNING
    make().reconcile()
    assert status() is JobStatus.QUEUED


def test_jobs_of_another_base_start_nothing(registry, runs):
    submit(registry, 2)
    other = Reconciler(
        registry, JobSettings(sessions=2), base="f" * 64, run_session=runs.session, run_trainer=runs.trainer
    )
    other.reconcile()
    assert other.active_slots == []
    mine = Reconciler(
        registry, JobSettings(sessions=2), base="b" * 64, run_session=runs.session, run_trainer=runs.trainer
    )
    mine.reconcile()
    assert mine.active_slots == ["session-1", "session-2"]
