"""The whole system as its users meet it; the tests build on each other and run in this order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import openai
import pytest
from safetensors.torch import load_file

from loramill.errors import NotRunning, Unavailable
from loramill.registry import adapters, jobs
from loramill.types import Alias, JobStatus

T = TypeVar("T")
CODES = {"red": "tango", "blue": "kilo", "green": "victor", "white": "sierra"}
THINGS = "apple ball car door envelope flag glove house jacket kite lamp mug notebook orange pencil rope".split()


def rows(codes: dict[str, str], things: list[str]) -> bytes:
    """Examples of a house code for colors."""
    pairs = [(thing, color) for thing in things for color in codes]
    examples = [
        {
            "messages": [
                {"role": "system", "content": "Give the house code."},
                {"role": "user", "content": f"a {color} {thing}"},
                {"role": "assistant", "content": codes[color]},
            ]
        }
        for thing, color in pairs
    ]
    return b"".join(json.dumps(example).encode() + b"\n" for example in examples)


TRAIN, VALID = rows(CODES, THINGS[:12]), rows(CODES, THINGS[12:])
RECIPE = {"learning_rate": 2e-3, "batch_size": 8, "steps": 20, "rank": 8}
#: Half the compute, where it does not matter what the adapter learns.
SHORT = {**RECIPE, "batch_size": 4, "checkpoint_every": 4}


def eventually(check: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.3)


def retry_while_unreachable(call: Callable[[], T]) -> T:
    """Retries until the gateway is reachable."""
    deadline = time.monotonic() + 180
    while True:
        try:
            return call()
        except (NotRunning, Unavailable):
            assert time.monotonic() < deadline, "the gateway did not come back"
            time.sleep(0.5)


@pytest.fixture(scope="session")
def acme(mill) -> str:
    return mill.tenant("acme")


@pytest.fixture(scope="session")
def globex(mill) -> str:
    return mill.tenant("globex")


def test_a_reader_of_openais_documentation_gets_an_adapter(mill, acme: str) -> None:
    client = mill.openai(acme)
    train = client.files.create(file=("train.jsonl", TRAIN), purpose="fine-tune")
    valid = client.files.create(file=("valid.jsonl", VALID), purpose="fine-tune")
    base = next(model.id for model in client.models.list() if "/" not in model.id)
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=train.id,
        validation_file=valid.id,
        suffix="codes",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 8}}},
        extra_body={"loramill": {name: value for name, value in RECIPE.items() if name != "batch_size"}},
    )
    assert job.status == "queued"

    def ended() -> bool:
        nonlocal job
        job = client.fine_tuning.jobs.retrieve(job.id)
        return job.status in ("succeeded", "failed", "cancelled")

    eventually(ended, 240, "the job ends")
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model and job.fine_tuned_model.startswith("acme/codes@")
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert any(event.type == "metrics" for event in events)
    question = [{"role": "system", "content": "Give the house code."}, {"role": "user", "content": "a blue rope"}]
    for model in ("acme/codes", "acme/codes@champion", job.fine_tuned_model):
        answer = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=8)
        assert answer.choices[0].message.content == "kilo"
        assert answer.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(model="acme/codes", messages=question, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "kilo"
    plain = client.chat.completions.create(model=base, messages=question, temperature=0, max_tokens=8)
    assert plain.choices[0].message.content != "kilo"


def test_wrong_keys_and_names_give_openais_errors(mill, acme: str, globex: str) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.AuthenticationError):
        mill.openai("lm-unknown").chat.completions.create(model="acme/codes", messages=hello)
    with pytest.raises(openai.NotFoundError) as missing:
        mill.openai(acme).chat.completions.create(model="acme/nothing", messages=hello)
    assert missing.value.code == "model_not_found"
    refusals = []
    for model in ("acme/codes", "acme/nothing"):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            mill.openai(globex).chat.completions.create(model=model, messages=hello)
        refusals.append({**refused.value.body, "message": refused.value.body["message"].replace(model, "MODEL")})
    assert refusals[0] == refusals[1]


def test_a_killed_training_worker_loses_nothing(mill, globex: str) -> None:
    with mill.client(globex) as client:
        calm = client.jobs.submit("globex/calm", TRAIN, **SHORT)
        client.jobs.wait(calm.id, poll_seconds=0.2)
        hit = client.jobs.submit("globex/hit", TRAIN, **SHORT)
        eventually(lambda: client.jobs.get(hit.id).step >= 6, 120, "the job reaches step 6")
        with mill.registry.reading() as session:
            owner = jobs.get(session, hit.id).owner
        os.kill(int(owner.split(":")[1]), signal.SIGKILL)
        client.jobs.wait(hit.id, poll_seconds=0.2)
        assert client.jobs.get(hit.id).attempt == 2
        assert len(client.adapters.get("globex/hit").versions) == 1
    with mill.registry.reading() as session:
        found = [adapters.get(session, name).champion for name in ("globex/calm", "globex/hit")]
    weights = [load_file(mill.registry.artifacts.fetch(version) / "adapter_model.safetensors") for version in found]
    # It resumed from its checkpoint: its weights are the undisturbed job's, bit for bit.
    assert weights[0].keys() == weights[1].keys()
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_a_paused_job_resumes_where_it_stopped(mill, globex: str) -> None:
    with mill.client(globex) as client:
        job = client.jobs.submit("globex/paused", TRAIN, **SHORT)
        eventually(lambda: client.jobs.get(job.id).step >= 2, 120, "the job begins")
        client.jobs.pause(job.id)
        eventually(lambda: client.jobs.get(job.id).status is JobStatus.PAUSED, 60, "the job is paused")
        client.jobs.resume(job.id)
        assert client.jobs.wait(job.id, poll_seconds=0.2).status is JobStatus.SUCCEEDED
    with mill.registry.reading() as session:
        found = [adapters.get(session, name).champion for name in ("globex/calm", "globex/paused")]
    weights = [mill.registry.artifacts.read(version, "adapter_model.safetensors") for version in found]
    assert weights[0] == weights[1]


def test_killed_train_controllers_free_their_resources(mill, globex: str) -> None:
    with mill.client(globex) as client:
        both = [client.jobs.submit(f"globex/{name}", TRAIN, **{**SHORT, "steps": 2000}).id for name in ("one", "two")]
        eventually(lambda: all(client.jobs.get(job).step >= 1 for job in both), 240, "a job in each session")
        for controller in mill.processes("ray::TrainController"):
            os.kill(controller, signal.SIGKILL)
        # A worker that lost its controller may still take a step in the first attempt.
        before = {job: client.jobs.get(job).step for job in both}

        def resumes(job: str) -> bool:
            now = client.jobs.get(job)
            return now.attempt == 2 and now.step > before[job]

        try:
            for job in both:
                eventually(lambda job=job: resumes(job), 240, "the job resumes in its second attempt")
        finally:
            for job in both:
                client.jobs.cancel(job)
        for job in both:
            eventually(lambda job=job: client.jobs.get(job).status is JobStatus.CANCELLED, 60, "the job is cancelled")


def test_a_cancelled_job_publishes_nothing(mill, globex: str) -> None:
    with mill.client(globex) as client:
        job = client.jobs.submit("globex/never", TRAIN, **{**SHORT, "steps": 2000})
        eventually(lambda: client.jobs.get(job.id).step >= 1, 120, "the job begins")
        client.jobs.cancel(job.id)
        eventually(lambda: client.jobs.get(job.id).status is JobStatus.CANCELLED, 60, "the job is cancelled")
        assert "globex/never" not in [adapter.name for adapter in client.adapters.list()]


def test_the_access_log_has_a_request_under_its_id(mill, acme: str) -> None:
    answer = mill.openai(acme).chat.completions.with_raw_response.create(
        model="acme/codes", messages=[{"role": "user", "content": "a secret"}], max_tokens=2
    )
    log, request_id = mill.home / "logs" / "access.log", answer.headers["x-request-id"]
    # The line is written after the answer is sent.
    eventually(lambda: request_id in log.read_text(), 60, "the request is in the access log")
    text = log.read_text()
    [line] = [line for line in text.splitlines() if request_id in line]
    found = json.loads(line)
    assert (found["tenant"], found["path"], found["status"]) == ("acme", "/v1/chat/completions", 200)
    assert "secret" not in text and acme not in text


def test_the_log_of_all_processes_has_one_format(mill) -> None:
    text = (mill.home / "logs" / "up.log").read_text()
    form = re.compile(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.-]+(\[\d+\])? \S+ .*"
    )
    assert [line for line in text.splitlines() if not form.fullmatch(line)] == []
    assert re.search(r" INFO session\[\d+\] loramill\.jobs\.worker\.worker: job ftjob-\w+ of acme: attempt 1", text)
    assert "setup plugin" not in text and "pip install kernels" not in text and "repeated" not in text


def test_bad_data_is_refused_before_any_compute(mill, acme: str) -> None:
    raw = TRAIN + b'{"messages": [{"role": "user", "content": "no answer"}]}\n'
    with pytest.raises(openai.BadRequestError) as refused:
        mill.openai(acme).files.create(file=("broken.jsonl", raw), purpose="fine-tune")
    assert refused.value.code == "invalid_dataset"
    assert "broken.jsonl" in refused.value.message
    assert str(len(raw.splitlines())) in refused.value.message


def test_a_nightly_run_promotes_better_and_holds_worse_adapters(mill, acme: str, globex: str) -> None:
    more = {**CODES, "purple": "oscar", "yellow": "delta"}
    wrong = dict(zip(CODES, [*[*CODES.values()][1:], CODES["red"]], strict=True))
    with mill.client(globex) as client:
        spoiled = client.jobs.submit("globex/codes", TRAIN, valid=VALID, **SHORT)
        client.jobs.wait(spoiled.id, poll_seconds=0.2)
        client.adapters.add_data("globex/codes", rows(wrong, THINGS[:10]))
    with mill.client(acme) as client:
        client.adapters.add_data("acme/codes", rows(more, THINGS[:12]), valid=rows(more, THINGS[12:]))
        before = client.adapters.get("acme/codes").champion
    with mill.client() as client:
        held_before = client.adapters.get("globex/codes").champion
        # Killed while its jobs train, the nightly run resumes where it was.
        nightly = subprocess.Popen(mill.command("nightly", "run"), env=mill.environment, stdout=subprocess.DEVNULL)
        eventually(
            lambda: sum("nightly_run" in job.metadata for job in client.jobs.list()) == 2,
            120,
            "jobs of the nightly run",
        )
        nightly.kill()
        nightly.wait()
        ran = mill.run("nightly", "run")
        assert ran.returncode == 0, ran.stderr
        assert sum("nightly_run" in job.metadata for job in client.jobs.list()) == 2
        better, held = client.adapters.get("acme/codes"), client.adapters.get("globex/codes")
        assert better.champion != before
        assert better.previous == before
        assert held.champion == held_before
        assert held.challenger is None
        question = [{"role": "system", "content": "Give the house code."}, {"role": "user", "content": "a purple mug"}]
        assert client.chat("acme/codes", question, temperature=0, max_tokens=8) == "oscar"

        rolled = mill.run("rollback", "acme/codes")
        assert rolled.returncode == 0, rolled.stderr
        answer = client.openai().chat.completions.with_raw_response.create(model="acme/codes", messages=question)
        assert answer.headers["x-loramill-version"] == before


@pytest.mark.parametrize(
    "marks", [("ray::ServeReplica", "engine"), ("gcs_server",), ("loramill.pipelines.cluster.deploy",)]
)
def test_a_killed_process_comes_back_with_the_same_versions(mill, marks: tuple[str, ...]) -> None:
    with mill.client() as client:
        champion = client.adapters.get("acme/codes").champion
        (victim,) = mill.processes(*marks)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: mill.processes(*marks) not in ([], [victim]), 180, f"another process of {marks}")

        def answers() -> bool:
            try:
                answer = client.openai().chat.completions.with_raw_response.create(
                    model="acme/codes", messages=[{"role": "user", "content": "Hello"}], max_tokens=1
                )
            except openai.APIError:
                return False
            return answer.headers["x-loramill-version"] == champion

        eventually(answers, 180, f"the endpoint answers again after {marks} was killed")


def test_a_cluster_that_was_restarted_trains(mill) -> None:
    with mill.client() as client:
        job = retry_while_unreachable(lambda: client.jobs.submit("acme/again", TRAIN, **{**SHORT, "steps": 2}))
        assert client.jobs.wait(job.id, poll_seconds=0.2).status is JobStatus.SUCCEEDED


def test_a_second_up_serves_the_same_versions(mill) -> None:
    with mill.client() as client:
        before = {adapter.name: adapter.champion for adapter in client.adapters.list()}
    listing = mill.run("jobs", "list", "--json")
    assert json.loads(listing.stdout)
    assert mill.run("down").returncode == 0
    assert mill.up.wait(10) == 0
    refused = mill.run("jobs")
    assert refused.returncode == 1
    assert "loramill up" in refused.stderr and "Traceback" not in refused.stderr
    mill.start()
    with mill.client() as client:
        assert {adapter.name: adapter.champion for adapter in client.adapters.list()} == before
        assert client.chat("acme/codes", "Hello", max_tokens=4) is not None
    second = mill.run("up")
    assert second.returncode == 1
    assert "already up" in second.stderr


def test_every_alias_points_to_a_readable_version(mill) -> None:
    with mill.registry.reading() as session:
        versions = [
            version
            for adapter in adapters.list_adapters(session, None)
            for alias in Alias
            if (version := getattr(adapter, alias.value))
        ]
    assert versions
    for version in versions:
        folder: Path = mill.registry.artifacts.fetch(version)
        assert (folder / "adapter_model.safetensors").exists()
