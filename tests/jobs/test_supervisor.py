"""The supervisor without Ray: what it starts, also where there are two of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramill.errors import Unavailable
from loramill.jobs.scheduling import reconciler as pool_module
from loramill.jobs.scheduling.reconciler import Reconciler
from loramill.registry import Registry, datasets, jobs, migrate, tenants
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings
from loramill.types import Executor, JobRecord, JobSpec, JobStatus


class Runs:
    """Sessions and trainers that do nothing until they are told to end."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended = threading.Event()

    def session(self, name: str, holder: str) -> None:
        self.started.append(name)
        self.ended.wait()

    def trainer(self, job: str, gpus: int) -> None:
        self.started.append(f"{job} on {gpus}")
        self.ended.wait()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    migrate(url := f"sqlite:///{tmp_path / 'loramill.db'}")
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
        given = {"base": "b" * 64, "adapter": "acme/bot", "train": data.id, "steps": 5, "batch_size": 2}
        priority = int(str(fields.pop("priority", 0)))
        spec = JobSpec.model_validate(given | fields)
        return [jobs.submit(session, spec, {}, executor=executor, priority=priority) for _ in range(count)]


def lease(registry: Registry, place: str, now: float | None = None) -> JobRecord | None:
    with registry.writing() as session:
        owner = pool_module.worker_name(place, 1)
        return jobs.lease(session, owner, now=now or time.time(), seconds=60, max_attempts=2)


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sessions_start_as_jobs_come_and_no_more_than_there_are_places(registry, make, runs):
    keeper = make()
    keeper.look()
    assert keeper.alive == []
    submit(registry, 2)
    keeper.look()
    keeper.look()
    assert keeper.alive == ["session-1", "session-2"]
    submit(registry, 5)
    keeper.look()
    assert sorted(runs.started) == keeper.alive == ["session-1", "session-2", "session-3"]
    runs.ended.set()
    eventually(lambda: not keeper.alive)
    runs.ended.clear()
    keeper.look()
    assert keeper.alive == ["session-1", "session-2", "session-3"]


def test_two_supervisors_start_nothing_twice(registry, make, runs):
    first, second = make(), make()
    submit(registry, 9)
    (dedicated,) = submit(registry, executor="dedicated", priority=1, gpus=2)
    threads = [threading.Thread(target=keeper.look) for keeper in (first, second) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(first.alive + second.alive) == sorted({*first.alive, *second.alive})
    assert sorted(runs.started) == [f"{dedicated.id} on 2", "session-1"]


def test_a_vanished_supervisors_places_are_free_soon_after(registry, make, runs, monkeypatch):
    first, second = make(), make()
    submit(registry, 3)
    first.look()
    second.look()
    assert len(first.alive) == 3 and second.alive == []
    now = time.time()
    monkeypatch.setattr(pool_module.time, "time", lambda: now + pool_module.SLOT_LEASE_SECONDS + 1)
    second.look()
    assert len(second.alive) == 3
    with registry.reading() as session:
        assert not worker_slots.is_open(
            session, "session-1", first.holder
        )  # where its session learns that it is to end
        assert worker_slots.is_open(session, "session-1", second.holder)


def test_a_high_priority_gets_the_place_of_a_low_one(registry, make):
    keeper = make(sessions=1)
    (low,) = submit(registry)
    keeper.look()
    assert lease(registry, "session-1").id == low.id
    (high,) = submit(registry, priority=1)
    keeper.look()
    keeper.look()
    with registry.writing() as session:
        assert jobs.get(session, low.id).pending_action == "preempt"
        jobs.release(session, low.id, 1)
    assert lease(registry, "session-1").id == high.id
    keeper.look()
    assert keeper.alive == ["session-1"]


def test_a_session_makes_room_for_a_trainer(registry, make, runs):
    keeper = make(sessions=1)
    submit(registry)
    keeper.look()
    running = lease(registry, "session-1")
    (large,) = submit(registry, executor="dedicated", priority=1)
    keeper.look()
    with registry.writing() as session:
        assert not worker_slots.is_open(session, "session-1", keeper.holder)
        assert jobs.get(session, running.id).pending_action == "preempt"
        jobs.release(session, running.id, 1)
    runs.ended.set()
    eventually(lambda: not keeper.alive)
    runs.ended.clear()
    keeper.look()
    assert keeper.alive == [large.id]


def test_lost_jobs_are_settled(registry, make):
    (job,) = submit(registry)
    lease(registry, "session-1", now=1000.0)
    make().look()
    with registry.reading() as session:
        assert jobs.get(session, job.id).status is JobStatus.QUEUED


def test_a_run_that_fails_at_once_is_not_started_again_at_once(registry, make, runs, monkeypatch):
    keeper = make()
    monkeypatch.setattr(runs, "session", None)
    failing = Reconciler(registry, JobSettings(sessions=1), run_session=fail, run_trainer=runs.trainer)
    submit(registry)
    failing.reconcile()
    keeper.look()
    assert failing.active_slots == ["session-1"]


def test_why_a_trainer_ended_is_in_the_jobs_history(registry):
    (job,) = submit(registry, executor="dedicated", gpus=2)
    keeper = Reconciler(registry, JobSettings(sessions=2), run_session=fail, run_trainer=fail)
    keeper.reconcile()

    def messages() -> list[str]:
        with registry.reading() as session:
            return [event.message for event in jobs.list_events(session, job.id)]

    eventually(lambda: "Its trainer ended: no GPU" in messages())


def fail(name: str, holder: object) -> None:
    raise RuntimeError("no GPU")


def test_it_watches_whatever_happens(registry, make, monkeypatch):
    monkeypatch.setattr(pool_module, "AWAY_SECONDS", 0.05)
    monkeypatch.setattr(pool_module, "LOOK_SECONDS", 0.05)
    keeper, ended, looks = make(), threading.Event(), []

    def look() -> None:
        looks.append(1)
        if len(looks) < 3:
            raise Unavailable("away")
        ended.set()

    monkeypatch.setattr(keeper, "look", look)
    keeper.watch(ended)
    assert len(looks) == 3


def test_after_an_outage_workers_have_time_to_report(registry, make, monkeypatch):
    monkeypatch.setattr(pool_module, "AWAY_SECONDS", 0.0)
    keeper, ended, looks, look = make(lease_seconds=60), threading.Event(), [], Reconciler.reconcile
    (job,) = submit(registry)
    lease(registry, "session-1", now=time.time() - 100)

    def status() -> JobStatus:
        with registry.reading() as session:
            return jobs.get(session, job.id).status

    def away_once() -> None:
        looks.append(1)
        if len(looks) == 1:
            raise Unavailable("away")
        look(keeper)
        ended.set()

    monkeypatch.setattr(keeper, "look", away_once)
    keeper.watch(ended)
    assert len(looks) == 2 and status() is JobStatus.RUNNING
    make().look()
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
