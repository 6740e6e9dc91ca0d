"""Fine-tune jobs through the unmodified openai client."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.errors import TrainingDiverged
from loramill.registry import jobs
from loramill.types import TARGETS, VersionRecord


@pytest.fixture
def file(client: OpenAI, jsonl: Any) -> str:
    return client.files.create(file=("train.jsonl", jsonl(40)), purpose="fine-tune").id


@pytest.fixture
def valid(client: OpenAI, jsonl: Any) -> str:
    return client.files.create(file=("valid.jsonl", jsonl(3, "other")), purpose="fine-tune").id


def test_create_with_autos(client: OpenAI, site: Any, tenant: str, file: str, valid: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, validation_file=valid)
    assert (job.object, job.status, job.model, job.organization_id) == ("fine_tuning.job", "queued", "tiny", tenant)
    assert (job.training_file, job.validation_file, job.seed) == (file, valid, 0)
    assert job.fine_tuned_model is None and job.finished_at is None and job.error is None and job.result_files == []
    # 40 examples in batches of 8: 3 epochs are 15 steps, which is too few.
    assert job.hyperparameters.to_dict() == {"n_epochs": 6, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert job.method is not None and job.method.type == "supervised"
    own = job.loramill  # type: ignore[attr-defined]
    assert (own["adapter"], own["step"], own["steps"], own["attempt"]) == (f"{tenant}/default", 0, 30, 0)
    spec = own["spec"]
    assert (spec["base"], spec["rank"], spec["learning_rate"]) == (site.base.fingerprint, 16, 1e-3)
    assert (spec["max_length"], spec["targets"], spec["start_from"]) == (512, list(TARGETS), None)
    assert (spec["train_on"], spec["epochs"], spec["alpha"]) == ("all", 6, 32.0)
    assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_create_with_everything(client: OpenAI, site: Any, tenant: str, file: str) -> None:
    champion = site.publish(f"{tenant}/support", f"{tenant} v1")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file,
        suffix="support",
        seed=7,
        metadata={"who": "me"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}},
        },
        extra_body={
            "loramill": {
                "rank": 8,
                "alpha": 16,
                "rslora": True,
                "targets": ["q_proj", "v_proj"],
                "max_length": 256,
                "start_from": "champion",
            }
        },
    )
    assert (job.seed, job.metadata) == (7, {"who": "me"})
    assert job.hyperparameters.to_dict() == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    own = job.loramill  # type: ignore[attr-defined]
    assert (own["adapter"], own["steps"]) == (f"{tenant}/support", 20)
    spec = own["spec"]
    assert (spec["rank"], spec["alpha"], spec["rslora"], spec["max_length"]) == (8, 16.0, True, 256)
    assert (spec["targets"], spec["start_from"]) == (["q_proj", "v_proj"], champion)


def test_a_job_continues_a_version_with_the_rank_of_its_job(client: OpenAI, site: Any, tenant: str, file: str) -> None:
    def create(**options: Any) -> Any:
        return client.fine_tuning.jobs.create(
            model="tiny", training_file=file, suffix="support", extra_body={"loramill": options}
        )

    champion = site.publish(f"{tenant}/support", f"{tenant} v1", job=create(rank=4, method="dora").id)
    spec = create(start_from="champion").loramill["spec"]
    assert (spec["start_from"], spec["method"], spec["rank"], spec["alpha"]) == (champion, "dora", 4, 8.0)


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 2), (32, 1), (11, 1), (1, 11)])
def test_epochs_are_shown_as_requested(client: OpenAI, jsonl: Any, batch_size: int, steps: int) -> None:
    file = client.files.create(file=("eleven.jsonl", jsonl(11)), purpose="fine-tune").id
    hyperparameters = {"n_epochs": 1, "batch_size": batch_size}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=hyperparameters)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (1, batch_size)
    assert job.loramill["steps"] == steps  # type: ignore[attr-defined]


def test_training_on_the_last_answer_with_a_rank_pattern(client: OpenAI, file: str) -> None:
    extra = {"loramill": {"train_on": "last", "rank": 4, "rank_pattern": {"q_proj": 2}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body=extra)
    spec = job.loramill["spec"]  # type: ignore[attr-defined]
    assert (spec["train_on"], spec["rank"], spec["alpha"]) == ("only_last", 4, 8.0)
    assert spec["alpha_pattern"] == {"q_proj": 4.0}


def test_older_clients_write_hyperparameters_at_the_top(client: OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters={"n_epochs": 5})
    assert job.hyperparameters.n_epochs == 5


PAIRS = "".join(
    json.dumps(
        {
            "input": {"messages": [{"role": "user", "content": f"number {i}?"}], "tools": []},
            "preferred_output": [{"role": "assistant", "content": f"it is {i}"}],
            "non_preferred_output": [{"role": "assistant", "content": "who knows"}],
        }
    )
    + "\n"
    for i in range(40)
).encode()
LABELS = "".join(
    json.dumps({"prompt": f"number {i}?", "completion": f" it is {i}", "label": i % 2 == 0}) + "\n" for i in range(40)
).encode()


@pytest.fixture
def pairs(client: OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", PAIRS), purpose="fine-tune").id


@pytest.mark.parametrize(("beta", "expected"), [(0.3, 0.3), ("auto", 0.1)])
def test_create_dpo(client: OpenAI, pairs: str, beta: Any, expected: float) -> None:
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": beta, "n_epochs": 2, "batch_size": 4}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=pairs, validation_file=pairs, method=method)
    assert job.method is not None and job.method.type == "dpo" and job.method.supervised is None
    assert job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert job.method.dpo.hyperparameters.to_dict() == hyperparameters | {"beta": expected}
    assert job.hyperparameters.to_dict() == hyperparameters
    spec = job.loramill["spec"]  # type: ignore[attr-defined]
    assert (spec["objective"], spec["dpo_loss"], spec["beta"], spec["steps"]) == ("dpo", "sigmoid", expected, 20)
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    (listed,) = client.fine_tuning.jobs.list().data
    assert listed.method == job.method


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_create_with_another_objective(client: OpenAI, pairs: str, objective: str) -> None:
    labels = client.files.create(file=("labels.jsonl", LABELS), purpose="fine-tune").id
    file = labels if objective == "kto" else pairs
    own = {"objective": objective, "beta": 0.2}
    for more in ({}, {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.7}}}}):
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"loramill": own}, **more)  # type: ignore[call-overload]
        spec = job.loramill["spec"]
        assert (job.method.type, spec["objective"], spec["beta"]) == ("dpo", objective, 0.2)


@pytest.mark.parametrize(
    ("objective", "kind", "message"),
    [
        (
            "sft",
            "pairs",
            "pairs.jsonl holds preferences between two answers, and the objective 'sft' needs answers to ",
        ),
        ("sft", "labels", "set 'objective' to 'kto'"),
        ("dpo", "answers", "set 'objective' to 'sft'"),
        ("orpo", "labels", "the objective 'orpo' needs preferences between two answers (input, preferred_output and"),
        ("kto", "pairs", "give other data, or set 'objective' to 'dpo' or 'orpo'"),
    ],
)
def test_data_must_fit_the_objective(client: OpenAI, jsonl: Any, objective: str, kind: str, message: str) -> None:
    contents = {"pairs": PAIRS, "labels": LABELS, "answers": jsonl(40)}
    files = {
        name: client.files.create(file=(f"{name}.jsonl", raw), purpose="fine-tune").id for name, raw in contents.items()
    }
    fitting = {"sft": "answers", "kto": "labels"}.get(objective, "pairs")
    for training, validation, param in ((kind, None, "training_file"), (fitting, kind, "validation_file")):
        given = {"validation_file": files[validation]} if validation else {}
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(
                model="tiny", training_file=files[training], extra_body={"loramill": {"objective": objective}}, **given
            )  # type: ignore[call-overload]
        assert message in caught.value.message
        assert (caught.value.param, caught.value.code) == (param, "invalid_dataset")


def test_preference_files_are_checked(client: OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.BadRequestError, match="line 2: preferred_output is None"):
        client.files.create(
            file=(
                "pairs.jsonl",
                PAIRS.splitlines()[0] + b'\n{"input": {"messages": [{"role": "user", "content": "a"}]}}',
            ),
            purpose="fine-tune",
        )
    found = http.post("/v1/files/check", files={"file": ("pairs.jsonl", PAIRS)}).json()
    assert (found["kind"], found["examples"]) == ("preference", 40)
    assert [part["supervised"] for part in found["preview"]] == [False, True, False, True]
    assert ["it is 0" in found["preview"][1]["text"], "who knows" in found["preview"][3]["text"]] == [True, True]


def _finish(site: Any, job_id: str, tenant: str) -> str:
    """Acts as the worker; returns the version."""
    with site.registry.writing() as session:
        while (leased := jobs.lease(session, "test", now=time.time(), seconds=60, max_attempts=2)) is not None:
            if leased.id == job_id:
                break
        jobs.heartbeat(session, job_id, 1, jobs.JobProgress(3, 99), now=time.time(), seconds=60)
        jobs.add_event(session, job_id, "Step 3", kind="metrics", data={"step": 3, "train_loss": 1.5})
        version = VersionRecord(
            id=hashlib.sha256(job_id.encode()).hexdigest(),
            adapter=f"{tenant}/default",
            job=job_id,
            base=site.base.fingerprint,
            bytes=1,
            created_at=time.time(),
        )
        return jobs.publish(session, job_id, 1, version).version


def test_life_of_a_job(client: OpenAI, site: Any, tenant: str, file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    version = _finish(site, job.id, tenant)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", f"{tenant}/default@{version[:12]}")
    assert done.finished_at is not None and done.trained_tokens == 99
    assert done.loramill["step"] == 30 and done.loramill["attempt"] == 1  # type: ignore[attr-defined]
    answer = client.chat.completions.create(model=done.fine_tuned_model, messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "hi"
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert [event.object for event in events] == ["fine_tuning.job.event"] * len(events)
    assert events[0].message.startswith("Published") and events[-1].message == "Queued."
    metrics = next(event for event in events if event.type == "metrics")
    assert metrics.data == {"step": 3, "train_loss": 1.5} and metrics.level == "info"
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def test_a_failed_job_has_its_error(client: OpenAI, site: Any, file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    with site.registry.writing() as session:
        while (leased := jobs.lease(session, "test", now=time.time(), seconds=60, max_attempts=2)) is not None:
            if leased.id == job.id:
                break
        jobs.fail(session, job.id, 1, TrainingDiverged("The loss became NaN."), retry=False)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed" and failed.error is not None and failed.fine_tuned_model is None
    assert (failed.error.code, failed.error.message) == ("training_diverged", "The loss became NaN.")


def test_cancel(client: OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_pages(client: OpenAI, site: Any, file: str) -> None:
    made = [client.fine_tuning.jobs.create(model="tiny", training_file=file).id for _ in range(5)]
    page = client.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in page.data] == made[:2:-1] and page.has_more
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    with site.registry.writing() as session:
        for number in range(6):
            jobs.add_event(session, made[0], f"event {number}")
    expected = [f"event {number}" for number in range(5, -1, -1)] + ["Queued."]
    assert [event.message for event in client.fine_tuning.jobs.list_events(made[0], limit=3)] == expected
    assert [event.message for event in client.fine_tuning.jobs.list_events(made[0])] == expected
    assert not client.fine_tuning.jobs.list_events(made[0], limit=7).has_more
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list_events(made[0], after="nonsense")
    for bad in ({"limit": 101}, {"extra_query": {"status": "queued"}}, {"extra_query": {"metadata": "null"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.list(**bad)  # type: ignore[arg-type]
        assert caught.value.param in ("limit", "status", "metadata")


def test_jobs_are_found_by_their_metadata(client: OpenAI, file: str) -> None:
    def made(**metadata: str) -> str:
        return client.fine_tuning.jobs.create(model="tiny", training_file=file, metadata=metadata).id

    def found(**metadata: str) -> list[str]:
        return [job.id for job in client.fine_tuning.jobs.list(metadata=metadata, limit=1)]

    first, second, third = made(team="a", run="1"), made(team="a", run="2"), made(team="b", run="")
    assert found(team="a") == [second, first]
    assert found(team="a", run="1") == [first]
    assert found(run="") == [third]
    assert found(team="c") == found(nothing="a") == found(**{"te.am": "a"}) == []
    odd = "'so' [1] $.a"
    assert found(**{odd: "1"}) == []
    fourth = made(**{odd: "1"})
    assert found(**{odd: "1"}) == [fourth]
    for unnameable in ('"', "\\", "é"):
        with pytest.raises(openai.BadRequestError, match="quote"):
            found(**{unnameable: "1"})


def test_another_tenants_job_is_not_found(client: OpenAI, admin: OpenAI, site: Any, other: str, jsonl: Any) -> None:
    theirs = site.openai(site.key(other))
    file = theirs.files.create(file=("a.jsonl", jsonl(10)), purpose="fine-tune").id
    foreign = theirs.fine_tuning.jobs.create(model="tiny", training_file=file).id
    bodies = set()
    for name in (foreign, "ftjob-none"):
        for call in (
            client.fine_tuning.jobs.retrieve,
            client.fine_tuning.jobs.cancel,
            client.fine_tuning.jobs.list_events,
            client.fine_tuning.jobs.checkpoints.list,
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                call(name)
            bodies.add(str(caught.value).replace(name, "ID"))
    assert len(bodies) == 1
    assert client.fine_tuning.jobs.list().data == []
    assert admin.fine_tuning.jobs.retrieve(foreign).status == "queued"
    for param in ("training_file", "validation_file"):
        files = {"training_file": client.files.create(file=("a.jsonl", jsonl(10)), purpose="fine-tune").id, param: file}
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(model="tiny", **files)
        assert refused.value.param == param


def test_an_admin_submits_for_a_tenant(site: Any, tenant: str, jsonl: Any) -> None:
    acting = site.openai(site.admin_key, organization=tenant)
    file = acting.files.create(file=("a.jsonl", jsonl(10)), purpose="fine-tune").id
    assert acting.fine_tuning.jobs.create(model="tiny", training_file=file).organization_id == tenant


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "gpt-4o-mini"}, "model", "invalid_request"),
        ({"training_file": "file-none"}, "training_file", "invalid_request"),
        ({"validation_file": "file-none"}, "validation_file", "invalid_request"),
        ({"suffix": "Not A Name"}, "suffix", "invalid_request"),
        ({"seed": -1}, "seed", "invalid_request"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_request"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_request"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "training_file", "invalid_dataset"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
            "method.supervised.hyperparameters.beta",
            "unsupported_parameter",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"gamma": 0.1}}}},
            "method.dpo.hyperparameters.gamma",
            "unsupported_parameter",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}},
            "hyperparameters.beta",
            "invalid_request",
        ),
        (
            {"method": {"type": "supervised"}, "extra_body": {"loramill": {"objective": "kto"}}},
            "loramill.objective",
            "invalid_request",
        ),
        (
            {"method": {"type": "dpo"}, "extra_body": {"loramill": {"objective": "sft"}}},
            "loramill.objective",
            "invalid_request",
        ),
        ({"extra_body": {"loramill": {"beta": 0.1}}}, "loramill.beta", "invalid_request"),
        (
            {"method": {"type": "dpo"}, "extra_body": {"loramill": {"desirable_weight": 2.0}}},
            "loramill.desirable_weight",
            "invalid_request",
        ),
        (
            {"method": {"type": "dpo"}, "extra_body": {"loramill": {"train_on": "last"}}},
            "loramill.train_on",
            "invalid_request",
        ),
        (
            {"method": {"type": "dpo"}, "extra_body": {"loramill": {"method": "full"}}},
            "loramill.method",
            "invalid_request",
        ),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_parameter"),
        ({"method": {"type": "wishing"}}, "method.type", "invalid_request"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", "unsupported_parameter"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_request"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_request"),
        ({"hyperparameters": {"n_epochs": 10**400}}, "hyperparameters.n_epochs", "invalid_request"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "invalid_request"),
        (
            {"hyperparameters": {"learning_rate_multiplier": -1}},
            "hyperparameters.learning_rate_multiplier",
            "invalid_request",
        ),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "unsupported_parameter"),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            },
            "hyperparameters",
            "invalid_request",
        ),
        ({"extra_body": {"loramill": {"wibble": 1}}}, "loramill.wibble", "unsupported_parameter"),
        ({"extra_body": {"loramill": {"rank": 0}}}, "loramill.rank", "invalid_request"),
        ({"extra_body": {"loramill": {"targets": ["lm_head"]}}}, "loramill.targets", "invalid_request"),
        ({"extra_body": {"loramill": {"layers": "0-2"}}}, "loramill.layers", "invalid_request"),
        ({"extra_body": {"loramill": {"rank_pattern": {"nose": 4}}}}, "loramill.rank_pattern", "invalid_request"),
        ({"extra_body": {"loramill": {"quantization": "nf4"}}}, "loramill.quantization", "invalid_request"),
        ({"extra_body": {"loramill": {"method": "qlora"}}}, "loramill.method", "invalid_request"),
        ({"extra_body": {"loramill": {"priority": 101}}}, "loramill.priority", "invalid_request"),
        ({"extra_body": {"loramill": {"gpus": 2, "executor": "session"}}}, "loramill.executor", "invalid_request"),
        ({"extra_body": {"loramill": {"max_length": 513}}}, "loramill.max_length", "invalid_request"),
        ({"extra_body": {"loramill": {"start_from": "champion"}}}, "loramill.start_from", "invalid_request"),
    ],
)
def test_refused_fields_are_named(client: OpenAI, file: str, change: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file, **change})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert client.fine_tuning.jobs.list().data == []


def test_nan_and_infinity_are_refused(http: httpx.Client, file: str) -> None:
    body = '{"model": "tiny", "training_file": "%s", "loramill": {"alpha": %s}}'
    for number in ("NaN", "Infinity", "1e999"):
        response = http.post(
            "/v1/fine_tuning/jobs", content=body % (file, number), headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "loramill.alpha")


def test_data_is_checked_against_the_spec(client: OpenAI, file: str, jsonl: Any) -> None:
    few = client.files.create(file=("few.jsonl", jsonl(3)), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=few)
    assert (caught.value.code, caught.value.param) == ("invalid_dataset", "training_file")
    assert "few.jsonl has 3 examples" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"loramill": {"max_length": 20}})
    assert caught.value.code == "invalid_dataset" and "train.jsonl, line 1" in caught.value.message


def test_warnings_about_the_data_are_events(client: OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, validation_file=file)
    levels = [event.level for event in client.fine_tuning.jobs.list_events(job.id)]
    assert "warn" in levels


@pytest.mark.parametrize("start", ["./foreign", "/srv/foreign", "ad/plain"])
def test_a_job_can_not_start_from_a_folder_without_an_import(client: OpenAI, file: str, start: str) -> None:
    extra = {"loramill": {"start_from": start}}
    with pytest.raises(openai.BadRequestError, match=f"adapters import .* {start}") as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="a", extra_body=extra)
    assert caught.value.param == "loramill.start_from"
