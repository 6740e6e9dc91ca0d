"""A worker on a real registry and the real base, without Ray."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loramill.data.examples import read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import TrainingDiverged
from loramill.jobs.worker import publish as publishing
from loramill.jobs.worker import worker as worker_module
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import Worker, encode_examples, run_next_job
from loramill.models.catalog import Base, load_for_training
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, datasets, jobs, tenants
from loramill.settings import JobSettings
from loramill.types import JobRecord, JobSpec, JobStatus

from ...chat_templates import GRANITE3
from ...databases import create_sqlite_database
from ...hermes import SETTINGS, hermes_tokenizer

ROWS = b"".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word.upper()}]}
    ).encode()
    + b"\n"
    for word in "one two three four five six seven eight".split()
)


@pytest.fixture(scope="module")
def model(base: Base) -> torch.nn.Module:
    return load_for_training(base, torch.bfloat16)


@pytest.fixture
def worker(tmp_path: Path, base: Base, model: torch.nn.Module) -> Worker:
    database = f"sqlite:///{tmp_path / 'loramill.db'}"
    create_sqlite_database(database)
    registry = Registry.open(database, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        tenants.create(session, "acme")
    settings = JobSettings(lease_seconds=20, max_attempts=2, backoff_seconds=0)
    return Worker(
        "w1",
        registry,
        base,
        lambda: model,
        torch.device("cpu"),
        ChatTokenizer.load(base.folder),
        tmp_path / "checkpoints",
        tmp_path / "logs",
        settings,
    )


def submit(worker: Worker, raw: bytes = ROWS, **fields: object) -> JobRecord:
    artifact = worker.registry.artifacts.put({"data.jsonl": raw})
    with worker.registry.writing() as session:
        dataset = datasets.create(session, "acme", "rows.jsonl", artifact, len(raw), 8).id
        spec = {"base": worker.base.fingerprint, "adapter": "acme/loud", "train": dataset, "steps": 2, "batch_size": 2}
        return jobs.submit(session, JobSpec.model_validate(spec | {"rank": 4} | fields), {})


def now(worker: Worker, job: JobRecord) -> JobRecord:
    with worker.registry.reading() as session:
        return jobs.get(session, job.id)


def test_a_job_becomes_a_version_that_peft_loads(worker: Worker) -> None:
    job = submit(worker)
    assert run_next_job(worker)
    done = now(worker, job)
    assert (done.status, done.step) == (JobStatus.SUCCEEDED, 2)
    folder = worker.registry.artifacts.fetch(done.version or "")
    adapted = PeftModel.from_pretrained(load_for_training(worker.base, torch.bfloat16), folder)
    assert adapted.peft_config["default"].r == 4
    origin = json.loads((folder / "loramill.json").read_text())
    assert (origin["job"], origin["base"]) == (job.id, worker.base.fingerprint)
    with worker.registry.reading() as session:
        assert adapters.get(session, AdapterName("acme", "loud")).champion == done.version
        metrics = [event for event in jobs.list_events(session, job.id) if event.kind == "metrics"]
    assert [event.data["step"] for event in metrics] == [1, 2]
    assert not (worker.checkpoints / job.id).exists()


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preferences_are_trained_to_a_version_with_rewards_as_metrics(worker: Worker, objective: str) -> None:
    judged = {"completion": " YES", "label": True} if objective == "kto" else {"chosen": " YES", "rejected": " no"}
    rows = [{"prompt": f"say {number}:", **judged} for number in range(8)]
    if objective == "kto":
        rows[1::2] = [{**row, "completion": " no", "label": False} for row in rows[1::2]]
    raw = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    job = submit(worker, raw, objective=objective, learning_rate=1e-3, steps=3, batch_size=8)
    assert run_next_job(worker)
    assert now(worker, job).status is JobStatus.SUCCEEDED
    with worker.registry.reading() as session:
        events = jobs.list_events(session, job.id)
    metrics = [event.data for event in events if event.kind == "metrics"]
    assert [metrics[-1][f"rewards/{name}"] > 0 for name in ("margins", "accuracies")] == [True, True]
    (counted,) = [event.message for event in events if "supervised" in event.message]
    assert counted.startswith(f"Training on {8 if objective == 'kto' else 16} of ")


def two_turns(count: int, **last: object) -> bytes:
    """Conversations with two answers; `last` is added to the second message."""
    rows = []
    for number in range(count):
        turns = [f"Do you ship to town {number}?", f"Yes, to town {number} in two days.", "And on Sunday?", "Not then."]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        messages[-1] |= last
        rows.append(json.dumps({"messages": messages}).encode() + b"\n")
    return b"".join(rows)


@pytest.mark.parametrize(
    ("last", "train_on", "trained"),
    [
        ({}, {}, 16),
        ({"weight": 1}, {}, 16),
        ({"weight": 0}, {}, 8),
        ({}, {"train_on": "only_last"}, 8),
        ({"weight": 1}, {"train_on": "only_last"}, 8),
        ({}, {"train_on": "last"}, 8),  # of older jobs
        ({"weight": 1}, {"train_on": "last"}, 16),
    ],
)
def test_a_job_reports_its_supervised_answers_once(
    worker: Worker, last: dict[str, object], train_on: dict[str, str], trained: int
) -> None:
    job = submit(worker, two_turns(8, **last), **train_on)
    for _ in range(2):
        with closing(worker_module.training_steps(worker, job, raise_if_stopped=lambda: None)):
            pass
    with worker.registry.reading() as session:
        (event,) = [event for event in jobs.list_events(session, job.id) if event.data]
    tokens = event.data["supervised_tokens"]
    assert event.data == {"examples": 8, "answers": 16, "trained_answers": trained, "supervised_tokens": tokens}
    assert event.message.startswith(f"Training on {trained} of 16 answers in 8 examples: {tokens} supervised tokens")
    first = sum(len(worker.tokenizer.encode_text(f"Yes, to town {number} in two days.")) + 1 for number in range(8))
    second = 8 * (len(worker.tokenizer.encode_text("Not then.")) + 1)
    assert tokens == {16: first + second, 8: first if last.get("weight") == 0 else second}[trained]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_settings_decide_about_deterministic_training(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    contexts = []
    monkeypatch.setattr(worker_module, "train", lambda model, context: contexts.append(context) or iter(()))
    settings = worker.settings.model_copy(update={"deterministic": deterministic})
    job = submit(worker)
    assert not list(
        worker_module.training_steps(replace(worker, settings=settings), job, raise_if_stopped=lambda: None)
    )
    assert [context.deterministic for context in contexts] == [deterministic]


def test_every_attempt_has_the_date_of_the_submission(worker: Worker) -> None:
    dated = ChatTokenizer(hermes_tokenizer().to_str(), {**SETTINGS, "chat_template": GRANITE3}, {})
    worker, examples = replace(worker, tokenizer=dated), read_examples(ROWS, "rows.jsonl")
    submitted = datetime(2024, 2, 29, 23, 59, tzinfo=UTC)
    job = submit(worker).model_copy(update={"created_at": submitted.timestamp()})
    [first, *_] = encode_examples(worker, job, examples)
    assert "Today's Date: February 29, 2024." in dated.decode(first.tokens)
    assert first == encode_examples(worker, job, examples)[0]


def test_a_permanent_error_is_not_retried(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise TrainingDiverged("NaN")

    monkeypatch.setattr(worker_module, "run_job", diverge)
    job = submit(worker)
    assert run_next_job(worker)
    assert (now(worker, job).status, now(worker, job).error_code) == (JobStatus.FAILED, "training_diverged")


def test_a_transient_error_is_retried_up_to_the_last_attempt(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise OSError("the network went away")

    monkeypatch.setattr(worker_module, "run_job", stumble)
    job = submit(worker)
    assert run_next_job(worker)
    assert now(worker, job).status is JobStatus.QUEUED
    assert run_next_job(worker)
    assert now(worker, job).status is JobStatus.FAILED
    assert "the network went away" in (now(worker, job).error_message or "")
    assert not run_next_job(worker)


def test_a_job_for_another_base_waits_for_a_worker_of_that_base(worker: Worker) -> None:
    job = submit(worker, base="0" * 64)
    assert not run_next_job(worker)
    assert (now(worker, job).status, now(worker, job).attempt) == (JobStatus.QUEUED, 0)


def test_a_worker_that_lost_its_lease_publishes_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(worker)
    publish = publishing.version

    def slow_publish(*arguments: object) -> None:
        with worker.registry.writing() as session:
            assert jobs.lease(session, "w2", now=time.time() + 60, seconds=20, max_attempts=5) is not None
        publish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(publishing, "version", slow_publish)
    assert run_next_job(worker)
    other = now(worker, job)
    assert (other.status, other.owner, other.version) == (JobStatus.RUNNING, "w2", None)
    with worker.registry.reading() as session:
        assert adapters.list_adapters(session, None) == []


def test_jobs_run_until_the_worker_should_stop(worker: Worker) -> None:
    first, second = submit(worker), submit(worker, seed=1)
    assert run_jobs(worker, should_stop=lambda idle: idle > 0.1) == 2
    assert {now(worker, first).status, now(worker, second).status} == {JobStatus.SUCCEEDED}
    with worker.registry.reading() as session:
        found = adapters.get(session, AdapterName("acme", "loud"))
    assert found.champion == now(worker, first).version
    assert found.challenger == now(worker, second).version
