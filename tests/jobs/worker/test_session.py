"""Sessions that train several jobs at once: each job ends as if alone, whatever happens to the others."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from bisect import bisect_left
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select, update

from loramill.jobs.train.engine import engine as engine_module
from loramill.jobs.train.engine.engine import TrainingEngine
from loramill.jobs.worker import publish
from loramill.jobs.worker import session as session_module
from loramill.jobs.worker.admission import SessionMemory
from loramill.jobs.worker.lease import Lease
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import run_next_job
from loramill.registry import jobs
from loramill.registry.database.tables import JobRow
from loramill.sizing import anatomy, find_config
from loramill.types import JobRecord, JobStatus

from ...waiting import eventually, in_thread
from ..environment import JobEnvironment

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def many_jobs_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(session_module.JOBS_AT_START, "cpu", 4)


@pytest.fixture
def environment(tmp_path: Path, tiny_chat_base: Path) -> JobEnvironment:
    return JobEnvironment.at(tmp_path, tiny_chat_base, per_session=4, max_attempts=2)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of each pass, in order."""
    sizes: list[int] = []
    run = TrainingEngine.run

    def counted(engine: TrainingEngine, parts: Any) -> Any:
        sizes.append(len(parts))
        return run(engine, parts)

    monkeypatch.setattr(TrainingEngine, "run", counted)
    return sizes


def run_session(environment: JobEnvironment, *queued: JobRecord) -> int:
    """Runs a session until these jobs have ended."""
    return run_jobs(
        environment.worker(), should_stop=lambda _: all(environment.now(job).status.final for job in queued)
    )


def outcome(environment: JobEnvironment, job: JobRecord) -> tuple[JobStatus, int]:
    record = environment.now(job)
    return record.status, record.attempt


def test_jobs_of_one_session_share_passes_and_end_as_if_alone(environment: JobEnvironment, passes: list[int]) -> None:
    kinds: list[dict[str, Any]] = [
        {"steps": 12, "seed": 3},
        {"steps": 6, "rank": 8, "method": "dora"},
        {"steps": 9, "method": "adalora", "valid": environment.data("umbra")},
    ]
    tenants = ("acme", "acme", "umbra")
    shared = [environment.submit(f"{tenant}/a", **kind) for tenant, kind in zip(tenants, kinds, strict=True)]
    assert run_session(environment, *shared) == 3
    assert max(passes) == 3
    for job, tenant, kind in zip(shared, tenants, kinds, strict=True):
        assert outcome(environment, job) == (JobStatus.SUCCEEDED, 1)
        alone = environment.submit(f"{tenant}/a", **kind)
        assert run_next_job(environment.worker())
        assert environment.weights(environment.now(alone).version) == environment.weights(environment.now(job).version)
    assert not [path for path in Path(environment.settings.checkpoints).iterdir() if any(path.iterdir())]


def test_a_session_takes_as_many_jobs_as_it_may(environment: JobEnvironment, passes: list[int]) -> None:
    queued = [environment.submit(f"tenant{number}/a", steps=30) for number in range(9)]
    assert run_session(environment, *queued) == 9
    assert max(passes) == 4
    assert {outcome(environment, job) for job in queued} == {(JobStatus.SUCCEEDED, 1)}


def test_a_session_on_a_cpu_begins_with_one_job_and_doubles_their_number(
    environment: JobEnvironment, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session_module.JOBS_AT_START, "cpu", 1)
    queued = [environment.submit(f"tenant{number}/a", steps=30) for number in range(7)]
    assert run_session(environment, *queued) == 7
    assert set(passes[:30]) == {1} and max(passes) == 4
    assert [size for size, _ in itertools.groupby(itertools.accumulate(passes, max))] == [1, 2, 3, 4]


def test_a_session_whose_passes_are_full_takes_no_further_job(
    tmp_path: Path, tiny_chat_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = JobEnvironment.at(tmp_path, tiny_chat_base, per_session=4, pass_tokens=1)
    queued = [environment.submit(f"tenant{number}/a", steps=30) for number in range(3)]
    adapters: list[Any] = []
    run = TrainingEngine.run

    def recorded(engine: TrainingEngine, parts: Any) -> Any:
        adapters.extend(part.adapter for part in parts)
        return run(engine, parts)

    monkeypatch.setattr(TrainingEngine, "run", recorded)
    assert run_session(environment, *queued) == 3
    assert len([adapter for adapter, _ in itertools.groupby(adapters, id)]) == 3


@pytest.mark.parametrize("first", [True, False])
def test_a_job_that_needs_a_session_for_itself_gets_it(
    environment: JobEnvironment, passes: list[int], first: bool
) -> None:
    queued = [environment.submit(f"tenant{number}/a", steps=30) for number in range(2)]
    with environment.registry.writing() as session:
        session.execute(update(JobRow).where(JobRow.id == queued[0 if first else 1].id).values(alone=True))
    assert run_session(environment, *queued) == 2
    assert set(passes) == {1} and all(was_alone(environment, job) for job in queued)


def test_a_session_without_memory_for_another_job_waits_until_one_ends(
    environment: JobEnvironment, passes: list[int]
) -> None:
    queued = [environment.submit(f"tenant{number}/a", steps=30) for number in range(3)]
    base = anatomy(find_config(environment.settings.base, environment.settings.cache))
    memory = partial(SessionMemory, base, "none", "cpu", pass_tokens=1024)
    two = [job.spec for job in queued[:2]]
    fits_two = bisect_left(range(2**34), True, key=lambda size: memory(bytes=size).fits(two))
    assert not memory(bytes=fits_two).fits([job.spec for job in queued])
    run_jobs(
        environment.worker(),
        should_stop=lambda _: all(environment.now(job).status.final for job in queued),
        memory=memory(bytes=fits_two),
    )
    assert max(passes) == 2
    assert {outcome(environment, job) for job in queued} == {(JobStatus.SUCCEEDED, 1)}


def was_alone(environment: JobEnvironment, job: JobRecord) -> bool:
    with environment.registry.reading() as session:
        return not session.scalars(select(JobRow.shared).where(JobRow.id == job.id)).one()


def test_what_fails_fails_alone(environment: JobEnvironment) -> None:
    good = [environment.submit("acme/a", steps=8), environment.submit("acme/b", steps=8)]
    unreadable = environment.submit("umbra/a", train=environment.data("umbra", b"not JSON\n"), steps=8)
    too_large = environment.submit("umbra/b", rank_pattern={"nothing": 3}, steps=8)
    run_session(environment, *good, unreadable, too_large)
    assert [outcome(environment, job) for job in good] == [(JobStatus.SUCCEEDED, 1)] * 2
    assert environment.now(unreadable).status is environment.now(too_large).status is JobStatus.FAILED
    assert environment.now(too_large).error_code == "invalid_request"


def test_a_full_disk_for_one_jobs_checkpoint_affects_no_other(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramill.errors import DiskFull
    from loramill.jobs.train import checkpoint

    write = checkpoint.write
    good, bad = environment.submit("acme/a", steps=8), environment.submit("umbra/a", steps=8)

    def full(folder: Path | str, *args: Any) -> None:
        if bad.id in str(folder):
            raise DiskFull("No space left.")
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write", full)
    run_session(environment, good, bad)
    assert outcome(environment, good) == (JobStatus.SUCCEEDED, 1)
    assert outcome(environment, bad) == (JobStatus.FAILED, 2)


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_a_job_stops_while_the_others_train(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    stopped, other = environment.submit("acme/a", steps=100_000), environment.submit("umbra/a", steps=100_000)
    ended = threading.Event()
    with in_thread(lambda: run_jobs(environment.worker(), should_stop=lambda _: ended.is_set())):
        eventually(lambda: environment.now(stopped).step > 1 and environment.now(other).step > 1)
        with environment.registry.writing() as session:
            (jobs.cancel if action == "cancel" else jobs.pause)(session, stopped.id)
        expected = JobStatus.CANCELLED if action == "cancel" else JobStatus.PAUSED
        eventually(lambda: environment.now(stopped).status is expected)
        before = environment.now(other).step
        eventually(lambda: environment.now(other).step > before)
        ended.set()
        with environment.registry.writing() as session:
            jobs.cancel(session, other.id)
    assert environment.now(other).status is JobStatus.CANCELLED


def test_the_others_train_while_a_checkpoint_is_stored(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing, stored, ended = threading.Event(), threading.Event(), threading.Event()
    checkpoint = publish.checkpoint

    def slow(*args: Any) -> None:
        storing.set()
        assert stored.wait(120)
        checkpoint(*args)

    monkeypatch.setattr(publish, "checkpoint", slow)
    validated = environment.submit("acme/a", steps=4, valid=environment.data("acme"))
    other = environment.submit("umbra/a", steps=100_000)
    with in_thread(lambda: run_jobs(environment.worker(), should_stop=lambda _: ended.is_set())):
        assert storing.wait(60)
        for _ in range(2):  # the first heartbeat may report a step from before
            before = environment.now(other).step
            eventually(lambda before=before: environment.now(other).step > before)
        stored.set()
        eventually(lambda: environment.now(validated).status.final)
        ended.set()
        with environment.registry.writing() as session:
            jobs.cancel(session, other.id)
    assert outcome(environment, validated) == (JobStatus.SUCCEEDED, 1)


def test_memory_that_runs_out_shrinks_the_pass_and_costs_no_attempt(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    predict = engine_module.predict

    def scarce(model: Any, base: Any, parts: Any) -> Any:
        if len(parts) > 2:
            raise MemoryError
        return predict(model, base, parts)

    monkeypatch.setattr(engine_module, "predict", scarce)
    queued = [environment.submit(f"tenant{number}/a", steps=6) for number in range(4)]
    run_session(environment, *queued)
    assert {outcome(environment, job) for job in queued} == {(JobStatus.SUCCEEDED, 1)}
    assert passes.count(4) <= 2


def test_the_jobs_of_a_killed_session_resume_and_none_is_done_twice(
    environment: JobEnvironment, tmp_path: Path
) -> None:
    quick = environment.settings.jobs.model_copy(update={"lease_seconds": 1.0})
    queued = [environment.submit(f"tenant{n}/a", steps=20 + 10 * n, checkpoint_every=1) for n in range(4)]

    def session() -> None:
        torch.set_num_threads(1)
        run_jobs(environment.worker("w2", settings=quick), should_stop=lambda _: False)

    killed = multiprocessing.get_context("fork").Process(target=session)
    killed.start()
    eventually(lambda: all(environment.now(job).step > 2 for job in queued))
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    run_jobs(
        environment.worker(settings=quick),
        should_stop=lambda _: all(environment.now(job).status.final for job in queued),
    )
    assert {outcome(environment, job) for job in queued} == {(JobStatus.SUCCEEDED, 2)}
    for number, job in enumerate(queued):
        alone = environment.submit(f"tenant{number}/b", steps=20 + 10 * number, checkpoint_every=1)
        assert run_next_job(environment.worker())
        assert environment.weights(environment.now(alone).version) == environment.weights(environment.now(job).version)


def test_a_lost_lease_ends_that_job_alone(environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramill.errors import LeaseLost

    lost, other = environment.submit("acme/a", steps=8), environment.submit("umbra/a", steps=8)
    check = Lease.raise_if_stopped

    def lose(lease: Lease) -> None:
        if lease._job.id == lost.id and lease.last_progress is not None and lease.last_progress.step == 3:
            raise LeaseLost("Another worker has the job.")
        check(lease)

    monkeypatch.setattr(Lease, "raise_if_stopped", lose)
    run_session(environment, other)
    assert outcome(environment, other) == (JobStatus.SUCCEEDED, 1)
    assert environment.now(lost).status is JobStatus.RUNNING  # until the lease runs out


def test_heartbeats_continue_after_an_error_of_any_kind(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, failed, heartbeat = environment.submit(steps=100_000), threading.Event(), Lease._heartbeat

    def unreliable(lease: Lease) -> Any:
        if not failed.is_set():
            failed.set()
            raise RuntimeError
        return heartbeat(lease)

    monkeypatch.setattr(Lease, "_heartbeat", unreliable)
    worker = environment.worker(settings=environment.settings.jobs.model_copy(update={"lease_seconds": 600.0}))
    with in_thread(lambda: run_jobs(worker, should_stop=lambda _: environment.now(job).status.final)):
        assert failed.wait(60)
        with environment.registry.writing() as session:
            jobs.cancel(session, job.id)
        eventually(lambda: environment.now(job).status is JobStatus.CANCELLED)
    [logged] = [record for record in caplog.records if "heartbeats fail" in record.getMessage()]
    assert logged.exc_info and logged.exc_info[0] is RuntimeError
