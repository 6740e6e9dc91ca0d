"""Faults, and requests of the owner, while a worker runs a job; on a tiny base."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session
from transformers import PreTrainedModel

from loramill.errors import DiskFull, LoramillError, OutOfMemory, TrainingDiverged, Unavailable
from loramill.jobs.train.context import TrainContext
from loramill.jobs.worker import session as session_module
from loramill.jobs.worker import worker as worker_module
from loramill.jobs.worker.lease import Lease
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import lease_next_job, run_next_job
from loramill.registry import Registry, adapters, jobs
from loramill.registry.jobs import checkpoints
from loramill.registry.jobs.queue import MAX_OUTAGE_DELAY_SECONDS
from loramill.types import JobRecord, JobStatus

from ...waiting import eventually, in_thread
from ..environment import JobEnvironment, rows
from .hold_training import hold_training, stop_requested


@pytest.fixture
def environment(tmp_path: Path, tiny_chat_base: Path) -> Iterator[JobEnvironment]:
    environment = JobEnvironment.at(tmp_path, tiny_chat_base)
    yield environment
    environment.registry.close()


def write(environment: JobEnvironment, act: Callable[..., Any], *arguments: Any) -> Any:
    with environment.registry.writing() as session:
        return act(session, *arguments)


@pytest.mark.parametrize("action", ["pause", "preempt"])
def test_a_preempted_job_resumes_to_the_same_weights(environment: JobEnvironment, action: str) -> None:
    calm = environment.submit("acme/calm", steps=24)
    assert run_next_job(environment.worker())
    job = environment.submit("acme/stopped", steps=24)
    with pytest.MonkeyPatch.context() as patch:
        hold_training(patch, 3, until=stop_requested)
        with in_thread(lambda: run_next_job(environment.worker())):
            eventually(lambda: environment.now(job).step == 3)
            write(environment, jobs.pause, job.id) if action == "pause" else write(environment, jobs.preempt, job.id, 1)
            left = JobStatus.PAUSED if action == "pause" else JobStatus.QUEUED
            eventually(lambda: environment.now(job).status is left)
    stopped = environment.now(job)
    assert stopped.step == 3
    assert list((Path(environment.settings.checkpoints) / job.id).iterdir())
    if action == "pause":
        assert not run_next_job(environment.worker())
        write(environment, jobs.resume, job.id)
    steps: list[int] = []
    progress = Lease.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "report", lambda lease, point: (steps.append(point.step), progress(lease, point)))
        assert run_next_job(environment.worker("w2"))
    assert steps == list(range(stopped.step + 1, 25))
    done = environment.now(job)
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2)
    assert environment.weights(done.version) == environment.weights(environment.now(calm).version)


def test_a_cancelled_job_stops_and_leaves_nothing(environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_training(monkeypatch, 3, until=stop_requested)
    job = environment.submit(steps=5000)
    with in_thread(lambda: run_next_job(environment.worker())):
        eventually(lambda: environment.now(job).step >= 3)
        write(environment, jobs.cancel, job.id)
        eventually(lambda: environment.now(job).status is JobStatus.CANCELLED)
    assert not (Path(environment.settings.checkpoints) / job.id).exists()
    with environment.registry.reading() as session:
        assert adapters.list_adapters(session, None) == []


def test_validated_checkpoints_become_versions_without_an_alias(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    champions = []

    def add(session: Session, *arguments: Any) -> Any:
        found = real(session, *arguments)
        champions.append(adapters.get(session, "acme/loud").champion)
        return found

    real = checkpoints.add
    monkeypatch.setattr(checkpoints, "add", add)
    job = environment.submit(steps=5, eval_every=1, valid=environment.data("acme", rows(["nine", "ten"])))
    assert run_next_job(environment.worker())
    assert champions == [None] * 5
    with environment.registry.reading() as session:
        found = checkpoints.list_checkpoints(session, job.id)
        versions = {version.id for version in adapters.list_versions(session, "acme/loud")}
    assert [point.step for point in found] == [5, 4, 3, 2, 1]
    stored = [point.version for point in found if point.version]
    assert len(stored) == len({*stored}) == 3
    done = environment.now(job)
    assert versions == {*stored, done.version}
    for version in stored:
        environment.registry.artifacts.fetch(version)
    assert {"step", "train_loss", "valid_loss"} <= found[0].metrics.keys()
    assert done.valid_loss == found[0].metrics["valid_loss"]


def test_the_registry_has_every_step_once(environment: JobEnvironment) -> None:
    job = environment.submit(steps=7)
    assert run_next_job(environment.worker())
    with environment.registry.reading() as session:
        events = [event for event in jobs.list_events(session, job.id) if event.kind == "metrics"]
    assert [event.data["step"] for event in events] == [1, 2, 3, 4, 5, 6, 7]
    done = environment.now(job)
    assert (done.step, done.trained_tokens) == (7, events[-1].data["trained_tokens"])
    assert done.loss == events[-1].data["train_loss"]


class Outage:
    """A database that refuses writes, until it has refused a number of those for which `counts` holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int, counts: Callable[[], bool] = lambda: True) -> None:
        self.left, writing = writes, Registry.writing

        def unreachable(registry: Registry) -> Any:
            if self.left:
                self.left -= counts()
                raise Unavailable("The connection was lost.")
            return writing(registry)

        monkeypatch.setattr(Registry, "writing", unreachable)


def test_a_job_continues_through_a_database_outage(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, beginning, flushing, flush = environment.submit(steps=30), threading.Event(), threading.Event(), Lease.flush
    monkeypatch.setattr(Lease, "flush", lambda lease: (flushing.set(), flush(lease)))
    hold_training(monkeypatch, 2, until=lambda _: beginning.is_set())
    with in_thread(lambda: run_next_job(environment.worker())):
        eventually(lambda: environment.now(job).step == 2)
        outage = Outage(monkeypatch, 2, counts=flushing.is_set)  # past the job's last step
        beginning.set()
    assert not outage.left
    done = environment.now(job)
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 1)


def test_a_worker_waits_through_a_database_outage(environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "OUTAGE_PAUSE_SECONDS", 0.1)
    job, worker = environment.submit(), environment.worker()
    outage = Outage(monkeypatch, 2)
    assert run_jobs(worker, should_stop=lambda idle: environment.now(job).status.final) == 1
    assert not outage.left


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int = 1) -> list[Any]:
    """Makes the first attempts fail; returns the list of the attempts' micro_tokens."""
    seen: list[Any] = []
    train = worker_module.train

    def sometimes(model: PreTrainedModel, context: TrainContext) -> Any:
        seen.append(context.micro_tokens)
        if len(seen) <= times:
            raise error
        return train(model, context)

    monkeypatch.setattr(worker_module, "train", sometimes)
    return seen


@pytest.mark.parametrize("error", [DiskFull("No room."), Unavailable("Away."), OSError("The network went away.")])
def test_a_transient_error_is_retried_later(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, error)
    job = environment.submit()
    waiting = environment.worker(settings=environment.settings.jobs.model_copy(update={"backoff_seconds": 100}))
    assert run_next_job(waiting)
    queued = environment.now(job)
    assert queued.status is JobStatus.QUEUED
    wait = MAX_OUTAGE_DELAY_SECONDS if isinstance(error, Unavailable) else 100
    assert 0.4 * wait < (queued.not_before or 0) - time.time() < 1.51 * wait
    assert str(error) in environment.messages(job)[-1]
    assert not run_next_job(waiting)
    with environment.registry.writing() as session:
        leased = jobs.lease(session, "w", now=time.time() + 200, seconds=20, max_attempts=3)
    assert leased is not None and worker_module.run_attempt(waiting, leased) is None
    assert environment.now(job).status is JobStatus.SUCCEEDED


def test_out_of_memory_is_retried_with_half_the_tokens_once(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = failing(monkeypatch, OutOfMemory("No room for a pass."), times=3)
    saved, lost = environment.submit(micro_tokens=64), None
    assert run_next_job(environment.worker()) and environment.now(saved).status is JobStatus.QUEUED
    seen.extend([0, 0])  # from here on there is enough memory
    assert run_next_job(environment.worker())
    assert environment.now(saved).status is JobStatus.SUCCEEDED
    assert (seen[0], seen[-1]) == (None, 32)
    del seen[:]
    lost = environment.submit(micro_tokens=64)
    assert run_next_job(environment.worker()) and run_next_job(environment.worker())
    assert (environment.now(lost).status, environment.now(lost).error_code) == (JobStatus.FAILED, "out_of_memory")
    assert seen == [None, 32]


def test_a_lost_gpu_ends_the_session_and_the_job_is_retried(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(session_module, "open_run", fail)
    monkeypatch.setattr(session_module, "device_works", lambda device: False)
    first, other = environment.submit(), environment.submit()
    with pytest.raises(Unavailable, match="session is being replaced"):
        run_jobs(environment.worker(), should_stop=lambda _: False)
    assert environment.now(first).status is JobStatus.QUEUED and any(
        "launch failure" in each for each in environment.messages(first)
    )
    assert environment.now(other).attempt == 0, "the session takes no further job"


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_unreadable_data_fails_at_once(environment: JobEnvironment, damage: str) -> None:
    job = environment.submit()
    (file,) = (environment.settings.home / "artifacts").glob("**/data.jsonl")
    file.chmod(0o600)
    file.write_bytes(b"{}\n") if damage == "changed" else file.unlink()
    assert run_next_job(environment.worker())
    failed = environment.now(job)
    assert (failed.status, failed.error_code, failed.attempt) == (JobStatus.FAILED, "artifact_corrupt", 1)


def test_divergence_keeps_the_last_checkpoint(environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    job = environment.submit(steps=6)
    progress = Lease.report

    def diverge(lease: Lease, point: Any) -> None:
        progress(lease, point)
        if point.step == 5:
            raise TrainingDiverged("NaN", examples=[3])

    monkeypatch.setattr(Lease, "report", diverge)
    assert run_next_job(environment.worker())
    failed = environment.now(job)
    assert (failed.status, failed.error_code, failed.step) == (JobStatus.FAILED, "training_diverged", 5)
    assert list((Path(environment.settings.checkpoints) / job.id).iterdir())


def test_a_worker_leases_jobs_of_its_executor(environment: JobEnvironment) -> None:
    job = environment.submit(executor="dedicated")
    assert lease_next_job(environment.worker(executor="session")) is None
    leased = lease_next_job(environment.worker(executor="dedicated"), job.id)
    assert leased is not None and leased.id == job.id
    assert lease_next_job(environment.worker(executor="dedicated"), job.id) is None


def test_a_lost_lease_stops_the_training(environment: JobEnvironment) -> None:
    job = environment.submit(steps=5000)
    ended: list[LoramillError | None] = []
    leased = lease_next_job(environment.worker())
    assert leased is not None
    with in_thread(lambda: ended.append(worker_module.run_attempt(environment.worker(), leased))):
        eventually(lambda: environment.now(job).step >= 2)
        with environment.registry.writing() as session:
            other = jobs.lease(session, "w2", now=time.time() + 60, seconds=60, max_attempts=3)
    assert other is not None and other.attempt == 2
    assert [error.code for error in ended if error] == ["lease_lost"]
    now: JobRecord = environment.now(job)
    assert (now.status, now.owner) == (JobStatus.RUNNING, "w2")
