"""Sweeps in a session: candidates train together, weak ones are dropped, and the best becomes the version."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from bisect import bisect_left
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loramill.errors import DiskFull, TrainingDiverged
from loramill.jobs.train import checkpoint
from loramill.jobs.train.loop import TrainingRun
from loramill.jobs.worker import publish
from loramill.jobs.worker.admission import SessionMemory, may_join
from loramill.jobs.worker.lease import Lease
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import Worker, remove_checkpoints, run_next_job
from loramill.registry import jobs
from loramill.registry.jobs import results
from loramill.sizing import anatomy, find_config
from loramill.types import JobRecord, JobStatus, SweepCandidate

from ...waiting import eventually, in_thread
from ..environment import JobEnvironment

pytestmark = pytest.mark.usefixtures("one_thread")

#: Learning rates of which the larger are the better ones, but for the last.
RATES = (1e-5, 3e-4, 3e-3, 2e-2)


@pytest.fixture
def environment(tmp_path: Path, tiny_chat_base: Path) -> JobEnvironment:
    return JobEnvironment.at(tmp_path, tiny_chat_base, max_attempts=2)


def submit_sweep(environment: JobEnvironment, adapter: str = "acme/a", **fields: Any) -> JobRecord:
    defaults = {"valid": environment.data("acme"), "steps": 16, "checkpoint_every": 4, "dropout": 0.0}
    candidates = tuple({"learning_rate": rate, "rank": 4 + index % 2} for index, rate in enumerate(RATES))
    return environment.submit(adapter, **defaults | {"candidates": candidates} | fields)


def run_session(environment: JobEnvironment, *queued: JobRecord) -> None:
    run_jobs(environment.worker(), should_stop=lambda _: all(environment.now(job).status.final for job in queued))


def last_loss(environment: JobEnvironment, job: JobRecord, candidate: SweepCandidate) -> float:
    """The training loss of a candidate's last step."""
    with environment.registry.reading() as session:
        data = [event.data for event in jobs.list_events(session, job.id)]
    return float([row["train_loss"] for row in data if row.get("candidate") == candidate.number][-1])


def losses_alone(environment: JobEnvironment, job: JobRecord) -> list[float]:
    """The lowest validation loss of each candidate, trained alone to the end."""
    lowest = []
    for spec in job.spec.trained_specs:
        alone = environment.submit(**spec.model_dump(exclude={"candidates", "base"}))
        assert run_next_job(environment.worker())
        with environment.registry.reading() as session:
            data = [event.data for event in jobs.list_events(session, alone.id)]
        lowest.append(min(row["valid_loss"] for row in data if "valid_loss" in row))
    return lowest


def test_the_best_candidate_becomes_the_version_and_the_table_is_kept(environment: JobEnvironment) -> None:
    job = submit_sweep(environment)
    run_session(environment, job)
    done = environment.now(job)
    assert (done.status, done.step, done.attempt) == (JobStatus.SUCCEEDED, 16, 1)
    best = next(each for each in done.sweep if each.state == "best")
    dropped = [each for each in done.sweep if each.state == "dropped"]
    assert sorted(each.step for each in dropped) == [4, 4, 16] and best.step == 16
    # Its weights are those of the same training alone, to the bit, and no candidate has a lower loss.
    (alone,) = [environment.submit(**{**done.spec.model_dump(exclude={"candidates", "base"})})]
    assert run_next_job(environment.worker())
    assert environment.weights(environment.now(alone).version) == environment.weights(done.version)
    assert best.best_valid_loss == min(each.best_valid_loss or 9.0 for each in done.sweep)
    # The spec has its values, in the job and with the version.
    assert best.values.items() <= done.spec.model_dump().items() and done.spec.candidates == job.spec.candidates
    origin = json.loads(environment.registry.artifacts.read(done.version or "", "loramill.json"))
    assert origin["spec"] == done.spec.model_copy(update={"candidates": ()}).model_dump(mode="json")
    # The tokens are those of all candidates; the losses and metrics, those of the best.
    assert (done.valid_loss, done.loss) == (best.valid_loss, last_loss(environment, job, best))
    assert done.trained_tokens == sum(each.trained_tokens for each in done.sweep)
    with environment.registry.reading() as session:
        steps = [line.split(",")[0] for line in results.metrics_csv(session, job.id).decode().splitlines()]
    assert steps == ["step", *map(str, range(1, 17))]
    assert [text for text in environment.messages(job) if "these train on" in text]
    assert environment.messages(job)[-2].startswith(f"The best of 4 candidates is {best.number} (")
    assert not any(Path(environment.settings.checkpoints).iterdir())


def test_candidates_share_a_session_with_other_jobs(tmp_path: Path, tiny_chat_base: Path) -> None:
    environment = JobEnvironment.at(tmp_path, tiny_chat_base, per_session=2)
    sweep, other = submit_sweep(environment), environment.submit("umbra/a", steps=12)
    run_session(environment, sweep, other)
    assert {environment.now(job).status for job in (sweep, other)} == {JobStatus.SUCCEEDED}
    alone = environment.submit("umbra/a", steps=12)
    assert run_next_job(environment.worker())
    assert environment.weights(environment.now(alone).version) == environment.weights(environment.now(other).version)


def test_all_candidates_need_room_next_to_the_other_jobs(environment: JobEnvironment) -> None:
    base = anatomy(find_config(environment.settings.base, environment.settings.cache))
    sweep, other = submit_sweep(environment), environment.submit("umbra/a")
    memory = partial(SessionMemory, base, "none", "cpu", pass_tokens=256)
    specs = (*sweep.spec.trained_specs, other.spec)
    fits = bisect_left(range(2**34), True, key=lambda size: memory(bytes=size).fits(specs))
    assert may_join(sweep, [other], memory(bytes=fits)) and may_join(other, [sweep], memory(bytes=fits))
    less = memory(bytes=fits - 1)
    assert not may_join(sweep, [other], less) and less.fits([sweep.spec])


def test_a_killed_sweep_resumes_and_decides_the_same(environment: JobEnvironment) -> None:
    undisturbed = submit_sweep(environment, steps=40, checkpoint_every=2)
    run_session(environment, undisturbed)
    job = submit_sweep(environment, steps=40, checkpoint_every=2)
    quick = environment.settings.jobs.model_copy(update={"lease_seconds": 1.0})

    def session() -> None:
        torch.set_num_threads(1)
        run_jobs(environment.worker("w2", settings=quick), should_stop=lambda _: False)

    killed = multiprocessing.get_context("fork").Process(target=session)
    killed.start()
    eventually(lambda: any(each.state == "dropped" for each in environment.now(job).sweep))
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    before = environment.now(job)
    run_jobs(environment.worker(settings=quick), should_stop=lambda _: environment.now(job).status.final)
    done, expected = environment.now(job), environment.now(undisturbed)
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2)
    assert before.status is JobStatus.RUNNING
    assert done.sweep == expected.sweep
    assert environment.weights(done.version) == environment.weights(expected.version)


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_a_sweep_stops_and_a_paused_one_resumes(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    job = submit_sweep(environment, steps=4000, checkpoint_every=1000)
    with in_thread(lambda: run_jobs(environment.worker(), should_stop=lambda _: environment.now(job).step > 2)):
        eventually(lambda: environment.now(job).step > 2)
        with environment.registry.writing() as session:
            (jobs.cancel if action == "cancel" else jobs.pause)(session, job.id)
        expected = JobStatus.CANCELLED if action == "cancel" else JobStatus.PAUSED
        eventually(lambda: environment.now(job).status is expected)
    folder = Path(environment.settings.checkpoints) / job.id
    if action == "cancel":
        assert not folder.exists()
        with environment.registry.writing() as session:
            again = jobs.retry(session, job.id)
        assert {each.step for each in again.sweep} == {0}
    else:
        assert sorted(path.name for path in folder.iterdir()) == [f"candidate-{number}" for number in range(1, 5)]


def failing(monkeypatch: pytest.MonkeyPatch, ranks: set[int], at: int) -> None:
    """Candidates of these ranks diverge at a step."""
    advance = TrainingRun.advance

    def diverge(run: TrainingRun) -> Any:
        if run._spec.rank in ranks and run.state.step == at:
            raise TrainingDiverged("loss nan", examples=[])
        return (yield from advance(run))

    monkeypatch.setattr(TrainingRun, "advance", diverge)


def test_a_candidate_that_diverges_is_dropped_alone(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {4}, at=2)
    job = submit_sweep(environment)
    run_session(environment, job)
    done = environment.now(job)
    assert done.status is JobStatus.SUCCEEDED
    assert [each.state for each in done.sweep if each.values["rank"] == 4] == ["failed", "failed"]
    assert {each.error for each in done.sweep} == {None, "loss nan"}
    assert sorted(each.state for each in done.sweep if each.values["rank"] == 5) == ["best", "dropped"]


def test_an_error_of_the_store_ends_the_attempt_and_another_one_resumes(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failures = checkpoint.write, []

    def full(folder: Path | str, spec: Any, data: Any) -> None:
        if "candidate-2" in str(folder) and data.run_state.step == 8 and not failures:
            failures.append(folder)
            raise DiskFull("No space left.")
        write(folder, spec, data)

    monkeypatch.setattr(checkpoint, "write", full)
    job = submit_sweep(environment, steps=32)
    run_session(environment, job)
    done = environment.now(job)
    assert failures and (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2)
    assert sorted(each.step for each in done.sweep) == [8, 8, 32, 32]


@pytest.mark.parametrize("checkpoints_left", [True, False])
def test_a_sweep_is_published_after_an_outage(
    environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch, checkpoints_left: bool
) -> None:
    """Without the checkpoints, which are removed a week after a failure, the best one is trained again."""
    version, failures = publish.version, []

    def away(worker: Worker, job: JobRecord, *args: Any) -> None:
        if not failures:
            failures.append(job.id)
            if not checkpoints_left:
                remove_checkpoints(worker, job)
            raise DiskFull("No space left.")
        version(worker, job, *args)

    monkeypatch.setattr(publish, "version", away)
    job = submit_sweep(environment)
    run_session(environment, job)
    done = environment.now(job)
    assert failures and (done.status, done.attempt, done.step) == (JobStatus.SUCCEEDED, 2, 16)
    assert sorted(each.state for each in done.sweep) == ["best", "dropped", "dropped", "dropped"]
    assert sum("The best of" in text for text in environment.messages(job)) == 1


def test_a_sweep_fails_once_all_candidates_have(environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {4, 5}, at=2)
    job = submit_sweep(environment)
    run_session(environment, job)
    done = environment.now(job)
    assert (done.status, done.error_code) == (JobStatus.FAILED, "job_failed")
    assert done.error_message is not None and "1: loss nan" in done.error_message
    with environment.registry.writing() as session:
        assert {each.state for each in jobs.retry(session, job.id).sweep} == {"training"}


def test_progress_never_goes_back(environment: JobEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    report = Lease.report_progress

    def noted(lease: Lease, progress: Any) -> None:
        seen.append((progress.step, progress.trained_tokens))
        report(lease, progress)

    monkeypatch.setattr(Lease, "report_progress", noted)
    job = submit_sweep(environment)
    run_session(environment, job)
    assert seen == sorted(seen) and [step for step, _ in seen] == sorted(step for step, _ in seen)
    assert seen[-1][0] == 16


def test_a_candidate_is_shown_as_it_is_stored() -> None:
    candidate = SweepCandidate(number=1, values={"targets": ["q_proj"]}, rung_losses=(0.5,))
    assert SweepCandidate.model_validate(candidate.model_dump(mode="json")) == candidate
