"""Every answer about jobs matches the openai client's own types: nothing is missing or of another type."""

from __future__ import annotations

import csv
import hashlib
import time
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from loramill.errors import TrainingDiverged
from loramill.registry import jobs
from loramill.registry.jobs import checkpoints
from loramill.types import JobEvent, JobRecord, JobStatus, VersionRecord

METRICS = {"train_loss": 1.5, "train_mean_token_accuracy": 0.5, "valid_loss": 1.25, "valid_mean_token_accuracy": 0.625}


def strict(answer: Any, own: frozenset[str] = frozenset()) -> Any:
    """The answer, once its type's own validation (which the client skips) has passed it; `own` keys are ours."""
    assert isinstance(answer, BaseModel)
    sent = answer.model_dump(exclude_unset=True)
    type(answer).model_validate(sent, strict=True)
    assert {*sent} - {*type(answer).model_fields} == own
    return answer


def strict_job(answer: Any) -> Any:
    # All of OpenAI's fields are sent, also those that may be left out.
    assert {*type(answer).model_fields} <= {*answer.model_dump(exclude_unset=True)}
    return strict(answer, frozenset({"loramill"}))


@pytest.fixture
def file(client: OpenAI, jsonl: Any) -> str:
    made = client.files.create(file=("train.jsonl", jsonl(40)), purpose="fine-tune")
    return strict(made, frozenset({"loramill"})).id


@pytest.fixture
def job(client: OpenAI, file: str) -> str:
    return strict_job(client.fine_tuning.jobs.create(model="tiny", training_file=file)).id


def lease(site: Any, job_id: str, owner: str = "test") -> JobRecord:
    """Acts as the worker that leases the job."""
    with site.registry.writing() as session:
        while (leased := jobs.lease(session, owner, now=time.time(), seconds=60, max_attempts=2)) is not None:
            if leased.id == job_id:
                return leased
    raise AssertionError(f"{job_id} is not queued")


def version_of(site: Any, job: JobRecord, content: str) -> VersionRecord:
    return VersionRecord(
        id=hashlib.sha256(content.encode()).hexdigest(),
        adapter=job.spec.adapter,
        job=job.id,
        base=site.base.fingerprint,
        bytes=1,
        created_at=time.time(),
    )


def beat(site: Any, job: JobRecord, step: int, **numbers: Any) -> None:
    with site.registry.writing() as session:
        jobs.heartbeat(
            session, job.id, job.attempt, jobs.JobProgress(step, 100 * step, **numbers), now=time.time(), seconds=60
        )
        data = {"step": step, "total_steps": job.spec.steps, "train_loss": 2.0 / step}
        jobs.add_event(session, job.id, f"Step {step}", kind="metrics", data=data)


def test_the_life_of_a_job(client: OpenAI, site: Any, tenant: str, job: str) -> None:
    leased = lease(site, job)
    beat(site, leased, 10, loss=1.5, valid_loss=None, tokens_per_second=100.0)
    running = strict_job(client.fine_tuning.jobs.retrieve(job))
    own = running.loramill
    assert (running.status, own["step"], own["loss"], own["tokens_per_second"]) == ("running", 10, 1.5, 100.0)
    # 20 steps are left, of 100 tokens each, at 100 tokens per second.
    assert running.estimated_finish == pytest.approx(time.time() + 20, abs=3)

    with site.registry.writing() as session:
        checkpoints.add(session, job, leased.attempt, 10, version_of(site, leased, f"{job} 10"), METRICS)
        checkpoints.add(session, job, leased.attempt, 20, None, {"train_loss": 1.0})
    newest, first = client.fine_tuning.jobs.checkpoints.list(job).data
    strict(newest), strict(first)
    assert (newest.step_number, newest.fine_tuned_model_checkpoint, newest.metrics.step) == (20, "", 20)
    assert first.metrics.to_dict() == {"step": 10, **METRICS}
    partial = client.chat.completions.create(
        model=first.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "so far?"}]
    )
    assert partial.choices[0].message.content == "so far?"

    with site.registry.writing() as session:
        version = version_of(site, leased, job)
        jobs.publish(session, job, leased.attempt, version)
    done = strict_job(client.fine_tuning.jobs.retrieve(job))
    assert (done.status, done.estimated_finish) == ("succeeded", None)
    answer = client.chat.completions.create(model=done.fine_tuned_model, messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "hi"
    for event in client.fine_tuning.jobs.list_events(job):
        strict(event)
    assert {strict_job(each).id for each in client.fine_tuning.jobs.list()} == {job}


def test_checkpoints_are_paginated(client: OpenAI, site: Any, job: str) -> None:
    leased = lease(site, job)
    with site.registry.writing() as session:
        for step in (10, 20, 30):
            checkpoints.add(session, job, leased.attempt, step, None, {"valid_loss": 1.0})
    page = client.fine_tuning.jobs.checkpoints.list(job, limit=2)
    assert [each.step_number for each in page.data] == [30, 20] and page.has_more
    assert [each.step_number for each in client.fine_tuning.jobs.checkpoints.list(job, limit=1)] == [30, 20, 10]
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.checkpoints.list(job, after="ftckpt-none")


def test_pause_and_resume(client: OpenAI, site: Any, job: str) -> None:
    # The client's types have no state `paused`: it is loramill's own.
    paused = strict_job(client.fine_tuning.jobs.pause(job))
    assert (paused.status, paused.loramill["status"]) == ("queued", "paused")
    assert client.fine_tuning.jobs.pause(job) == paused
    resumed = strict_job(client.fine_tuning.jobs.resume(job))
    assert (resumed.status, resumed.loramill["status"]) == ("queued", "queued")
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.resume(job)
    lease(site, job)
    pausing = strict_job(client.fine_tuning.jobs.pause(job))
    assert (pausing.status, pausing.loramill["pending_action"]) == ("running", "pause")
    assert strict_job(client.fine_tuning.jobs.cancel(job)).loramill["pending_action"] == "cancel"


def test_a_failure_and_a_cancellation(client: OpenAI, site: Any, file: str, job: str) -> None:
    leased = lease(site, job)
    with site.registry.writing() as session:
        jobs.fail(session, job, leased.attempt, TrainingDiverged("NaN."), retry=False)
    failed = strict_job(client.fine_tuning.jobs.retrieve(job))
    assert failed.error.code == "training_diverged" and failed.result_files == []
    other = client.fine_tuning.jobs.create(model="tiny", training_file=file).id
    assert strict_job(client.fine_tuning.jobs.cancel(other)).status == "cancelled"


def test_results_are_a_table_of_the_steps(client: OpenAI, site: Any, job: str) -> None:
    first = lease(site, job)
    for step in (1, 2, 3):
        beat(site, first, step)
    with site.registry.writing() as session:
        jobs.release(session, job, first.attempt)
    again = lease(site, job)
    with site.registry.writing() as session:  # step 3 is done again, and measured
        data = {"step": 3, "train_loss": 0.5, "valid_loss": 0.75}
        jobs.add_event(session, job, "Step 3", kind="metrics", data=data)
        jobs.heartbeat(session, job, again.attempt, jobs.JobProgress(3, 9), now=time.time(), seconds=60)
    assert client.fine_tuning.jobs.retrieve(job).result_files == []
    client.fine_tuning.jobs.cancel(job)
    with site.registry.writing() as session:
        jobs.release(session, job, again.attempt)
    (name,) = client.fine_tuning.jobs.retrieve(job).result_files
    made = strict(client.files.retrieve(name))
    content = client.files.content(name).read()
    assert (made.purpose, made.filename, made.bytes) == ("fine-tune-results", "step_metrics.csv", len(content))
    rows = list(csv.DictReader(content.decode().splitlines()))
    assert [(row["step"], row["train_loss"], row["valid_loss"]) for row in rows] == [
        ("1", "2.0", ""),
        ("2", "1.0", ""),
        ("3", "0.5", "0.75"),
    ]


def test_events_are_read_page_by_page(client: OpenAI, site: Any, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a page costs the same however long the history is."""
    with site.registry.writing() as session:
        for number in range(40):
            jobs.add_event(session, job, str(number))
    read = []
    monkeypatch.setattr(
        "loramill.types.JobEvent.model_validate",
        lambda row, validate=JobEvent.model_validate: read.append(row) or validate(row),
    )
    page = client.fine_tuning.jobs.list_events(job, limit=5)
    assert [event.message for event in page.data] == ["39", "38", "37", "36", "35"] and page.has_more
    assert len(read) == 6
    assert [event.message for event in page.get_next_page().data] == ["34", "33", "32", "31", "30"]


@pytest.mark.parametrize(
    ("own", "priority", "executor"),
    [
        ({}, 0, "session"),
        ({"priority": 7, "executor": "dedicated"}, 7, "dedicated"),
        ({"gpus": 2}, 0, "dedicated"),
        ({"method": "full"}, 0, "dedicated"),
        ({"steps": 1_000_000, "checkpoint_every": 100}, 0, "dedicated"),
    ],
)
def test_the_priority_and_executor_of_a_job(
    client: OpenAI, site: Any, file: str, own: Any, priority: int, executor: str
) -> None:
    made = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"loramill": own})
    assert (made.loramill["priority"], made.loramill["executor"]) == (priority, executor)  # type: ignore[attr-defined]
    with site.registry.reading() as session:
        record = jobs.get(session, made.id)
    assert (record.priority, record.executor, record.status) == (priority, executor, JobStatus.QUEUED)
    client.fine_tuning.jobs.cancel(made.id)


def test_a_job_is_sized_at_submission(client: OpenAI, site: Any, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sized = []

    def fit_spec(spec: Any, base: Any, lengths: Any, settings: Any, adjustable: Any) -> Any:
        sized.append((base, tuple(lengths), settings))
        return spec.model_copy(update={"micro_tokens": 64}), "Fits with 64 tokens per pass."

    monkeypatch.setattr("loramill.submission.submit.fit_spec", fit_spec)
    made = client.fine_tuning.jobs.create(model="tiny", training_file=file, validation_file=file)
    assert made.loramill["micro_tokens"] == 64  # type: ignore[attr-defined]
    ((base, lengths, settings),) = sized
    assert (base, settings, len(lengths)) == (site.base, site.settings.jobs, 80)
    assert len(set(lengths)) == 2 and lengths[:40] == lengths[40:]  # of one digit and of two
    messages = [event.message for event in client.fine_tuning.jobs.list_events(made.id)]
    assert "Fits with 64 tokens per pass." in messages


def test_wandb_is_a_setting(client: OpenAI, file: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"jobs\.loggers"):
        client.fine_tuning.jobs.create(
            model="tiny", training_file=file, integrations=[{"type": "wandb", "wandb": {"project": "x"}}]
        )


def test_a_job_outlives_its_file(client: OpenAI, file: str, job: str) -> None:
    with pytest.raises(openai.ConflictError, match=job):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job)
    assert strict(client.files.delete(file)).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file)
    left = strict_job(client.fine_tuning.jobs.retrieve(job))
    assert (left.training_file, left.hyperparameters.n_epochs, left.hyperparameters.batch_size) == (file, 6, 8)
    assert [each.id for each in client.fine_tuning.jobs.list()] == [job]
