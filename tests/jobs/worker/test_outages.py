"""Outages of the store or the database while jobs run: nothing is lost, and all jobs resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loramill.errors import StoreUnusable, Unavailable
from loramill.jobs.scheduling import reconciler as reconciler_module
from loramill.jobs.scheduling.reconciler import Reconciler, worker_name
from loramill.jobs.train.checkpoint import latest
from loramill.jobs.train.checkpoint_store import delete_all
from loramill.jobs.worker import session as session_module
from loramill.jobs.worker.lease import Lease
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import Worker, run_next_job
from loramill.registry import jobs, migrate
from loramill.types import JobRecord, JobStatus

from ... import switchable_store
from ...postgresql import PostgreSQL
from ...waiting import eventually, in_thread
from ..environment import JobEnvironment
from .hold_training import hold_training

URL = "switched://bucket/loramill"


@pytest.fixture
def environment(tmp_path: Path, tiny_chat_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobEnvironment]:
    """An environment whose artifacts and checkpoints are in a store that can be switched off; two attempts per job."""
    switchable_store.clear()
    monkeypatch.setattr(session_module, "OUTAGE_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(session_module, "MAX_OUTAGE_PAUSE_SECONDS", 0.05)
    home = JobEnvironment.at(tmp_path, tiny_chat_base, max_attempts=2, backoff_seconds=0.02)
    home.registry.close()
    environment = JobEnvironment.opened(home.settings.model_copy(update={"artifacts_url": URL}))
    yield environment
    environment.registry.close()
    switchable_store.clear()


def worker_of(environment: JobEnvironment, owner: str = "w1") -> Worker:
    return environment.worker(owner, checkpoints=environment.settings.checkpoints)


@contextmanager
def working(environment: JobEnvironment, *queued: JobRecord) -> Iterator[None]:
    """A worker that stops when these jobs have ended."""
    with in_thread(
        lambda: run_jobs(
            worker_of(environment), should_stop=lambda _: all(environment.now(job).status.final for job in queued)
        )
    ):
        yield


def leases(environment: JobEnvironment, job: JobRecord) -> int:
    return environment.now(job).attempt


OUTAGES: dict[str, Callable[[], Exception]] = {
    "no endpoint": switchable_store.away,
    "expired credentials": lambda: switchable_store.translated(PermissionError("?"), "ExpiredToken", 400),
}


@pytest.mark.parametrize("case", OUTAGES)
def test_an_unavailable_store_costs_no_attempt(
    environment: JobEnvironment, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = environment.submit("acme/calm", steps=12)
    assert run_next_job(worker_of(environment))
    train, next_one = environment.submit("acme/running", steps=12), environment.submit("acme/queued", steps=12)
    away = threading.Event()
    hold_training(monkeypatch, 3, until=lambda _: away.is_set())
    with working(environment, train, next_one):
        eventually(lambda: environment.now(train).step == 3)
        with switchable_store.off(OUTAGES[case]):
            away.set()
            eventually(lambda: leases(environment, train) >= 4 and leases(environment, next_one) >= 3)
    for job in (train, next_one):
        done = environment.now(job)
        assert done.status is JobStatus.SUCCEEDED
        assert environment.weights(done.version) == environment.weights(environment.now(calm).version)
    assert any("This uses up no attempt: The store" in message for message in environment.messages(train))
    assert "10.1.2.3" not in " ".join(environment.messages(train))


def test_a_job_resumes_from_its_checkpoint_after_an_outage(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, steps, progress = environment.submit(steps=9), list[int](), Lease.report
    monkeypatch.setattr(Lease, "report", lambda lease, point: (steps.append(point.step), progress(lease, point)))
    with switchable_store.off(lambda: switchable_store.away() if steps[-1:] == [7] else None):  # type: ignore[arg-type, return-value]
        assert run_next_job(worker_of(environment))
    assert environment.now(job).status is JobStatus.QUEUED
    assert run_next_job(worker_of(environment))
    assert environment.now(job).status is JobStatus.SUCCEEDED
    assert steps == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def test_an_outage_of_the_store_is_not_a_missing_checkpoint(environment: JobEnvironment) -> None:
    spec = environment.spec("acme/loud", environment.data("acme"))
    checkpoints = f"{environment.settings.checkpoints}/job"
    with switchable_store.off(switchable_store.away), pytest.raises(Unavailable):
        latest(checkpoints, spec)
    with switchable_store.off(lambda: PermissionError("Access Denied")), pytest.raises(StoreUnusable):
        latest(checkpoints, spec)
    with switchable_store.off(switchable_store.away), pytest.raises(Unavailable):
        delete_all(checkpoints)
    assert latest(checkpoints, spec) is None


def test_a_job_ends_even_if_its_checkpoints_can_not_be_removed(environment: JobEnvironment) -> None:
    job = environment.submit(steps=4)
    with switchable_store.off(switchable_store.away, "rm"):
        assert run_next_job(worker_of(environment))
    assert environment.now(job).status is JobStatus.SUCCEEDED


def test_a_failed_job_is_retried_from_its_checkpoint(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, steps, progress = environment.submit(steps=9), list[int](), Lease.report

    def report(lease: Lease, point: object) -> None:
        steps.append(point.step)  # type: ignore[attr-defined]
        progress(lease, point)  # type: ignore[arg-type]
        if steps == [1, 2, 3, 4, 5]:
            raise StopIteration

    monkeypatch.setattr(Lease, "report", report)
    once = environment.settings.jobs.model_copy(update={"max_attempts": 1})
    assert run_next_job(environment.worker(checkpoints=environment.settings.checkpoints, settings=once))
    assert environment.now(job).status is JobStatus.FAILED
    with environment.registry.writing() as session:
        jobs.retry(session, job.id)
    assert run_next_job(worker_of(environment))
    assert environment.now(job).status is JobStatus.SUCCEEDED
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]


def test_a_job_of_another_base_is_not_leased(environment: JobEnvironment) -> None:
    job = environment.submit(base="f" * 64)
    assert not run_next_job(worker_of(environment))
    assert (environment.now(job).status, leases(environment, job)) == (JobStatus.QUEUED, 0)


@contextmanager
def running(ended: threading.Event, *tasks: Callable[[], object]) -> Iterator[None]:
    """Threads that end once `ended` is set, as it is after the block."""
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def while_set(event: threading.Event) -> Iterator[None]:
    event.set()
    try:
        yield
    finally:
        event.clear()


def counted_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[bool], int]:
    """Counts a function's calls that succeeded (True) or failed because the database was unavailable (False)."""
    ends, act = list[bool](), getattr(owner, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        try:
            result = act(*arguments, **named)
        except Unavailable:
            ends.append(False)
            raise
        ends.append(True)
        return result

    monkeypatch.setattr(owner, name, counting)
    return ends.count


def test_a_database_that_stops_for_longer_than_a_lease_costs_no_attempt(
    tmp_path: Path, tiny_chat_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (session_module, reconciler_module):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.1)
        monkeypatch.setattr(module, "OUTAGE_PAUSE_SECONDS", 0.1)
    with PostgreSQL.installed() as server:
        server.start()
        # Long, so that it does not expire on a busy machine: the test moves the clock instead.
        home = JobEnvironment.at(tmp_path, tiny_chat_base, lease_seconds=60.0, max_attempts=1).settings
        settings = home.model_copy(update={"database_url": f"{server.url}/postgres"})
        migrate(settings.database)
        environment, other, ended = JobEnvironment.opened(settings), JobEnvironment.opened(settings), threading.Event()
        reconciler = Reconciler(
            other.registry, settings.jobs, run_session=lambda *_: ended.wait(), run_trainer=lambda *_: None
        )
        silent, heartbeat = threading.Event(), Lease._heartbeat
        monkeypatch.setattr(
            Lease, "_heartbeat", lambda lease: lose_heartbeat() if silent.is_set() else heartbeat(lease)
        )
        heartbeats = counted_calls(monkeypatch, Lease, "_heartbeat")
        job, stopped = environment.submit(steps=30), threading.Event()
        hold_training(monkeypatch, 3, until=lambda _: stopped.is_set())
        try:
            with in_thread(lambda: run_next_job(environment.worker(worker_name("session-1", 1)))):
                eventually(lambda: environment.now(job).step == 3)
                others = (
                    counted_calls(monkeypatch, session_module, "lease_next_job"),
                    counted_calls(monkeypatch, Reconciler, "reconcile"),
                )
                with running(
                    ended,
                    lambda: reconciler.run(ended),
                    lambda: run_jobs(other.worker("w2"), should_stop=lambda _: ended.is_set()),
                ):
                    eventually(lambda: all(count(True) > 0 for count in others))
                    server.stop()
                    stopped.set()
                    eventually(lambda: all(count(False) > 0 for count in (heartbeats, *others)))
                    # The lease expires, and the other workers look for jobs before the job's worker can report.
                    later = time.time() + 2 * settings.jobs.lease_seconds
                    monkeypatch.setattr(time, "time", lambda: later)
                    with while_set(silent):
                        server.start()
                        before = [count(True) for count in others]
                        eventually(lambda: all(count(True) > n + 1 for count, n in zip(others, before, strict=True)))
                    assert (environment.now(job).status.final, leases(environment, job)) == (False, 1)
                    eventually(lambda: environment.now(job).status.final)
            done = environment.now(job)
        finally:
            environment.registry.close()
            other.registry.close()
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 1)


def lose_heartbeat() -> None:
    raise Unavailable("No heartbeat arrives.")
