"""Sweeps through the unmodified openai client."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from openai import OpenAI

from loramill.registry import jobs
from loramill.types import SweepCandidate

SWEEP = {"learning_rate": [1e-4, 1e-3], "rank": [4, 8]}


@pytest.fixture
def files(client: OpenAI, jsonl: Any) -> dict[str, str]:
    train = client.files.create(file=("train.jsonl", jsonl(40)), purpose="fine-tune").id
    valid = client.files.create(file=("valid.jsonl", jsonl(3, "other")), purpose="fine-tune").id
    return {"training_file": train, "validation_file": valid}


def test_a_sweep_is_one_job_with_a_table(client: OpenAI, site: Any, files: dict[str, str]) -> None:
    extra = {"loramill": {"sweep": SWEEP, "steps": 16}}
    job = client.fine_tuning.jobs.create(model="tiny", **files, extra_body=extra)
    own: Any = job.loramill  # type: ignore[attr-defined]
    assert [each["values"] for each in own["sweep"]] == [
        {"rank": rank, "alpha": 2.0 * rank, "learning_rate": rate} for rate in (1e-4, 1e-3) for rank in (4, 8)
    ]
    assert (own["steps"], own["executor"], own["spec"]["rank"]) == (16, "session", 4)
    assert {(each["state"], each["step"]) for each in own["sweep"]} == {("training", 0)}
    # What a worker reports is shown.
    with site.registry.writing() as session:
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=3, job_id=job.id)
        assert leased is not None
        halved = [
            each.model_copy(update={"step": 4, "state": "dropped" if each.number > 2 else "training"})
            for each in leased.sweep
        ]
        progress = jobs.JobProgress(4, 700, tokens_per_second=100.0, sweep=halved)
        jobs.heartbeat(session, job.id, leased.attempt, progress, now=time.time(), seconds=60)
    shown = client.fine_tuning.jobs.retrieve(job.id)
    table = [SweepCandidate.model_validate(each) for each in shown.loramill["sweep"]]  # type: ignore[attr-defined]
    assert [each.state for each in table] == ["training", "training", "dropped", "dropped"]
    # 24 of 40 steps of all candidates are left: half as long again as the first 700 tokens took.
    assert shown.estimated_finish is not None and abs(shown.estimated_finish - time.time() - 10.5) < 3
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("own", "param"),
    [
        ({"sweep": {"rank": [4]}}, "loramill.sweep"),
        ({"sweep": {"rank": [4, 4]}}, "loramill.sweep"),
        ({"sweep": {"training_file": ["a", "b"]}}, "loramill.sweep"),
        ({"sweep": {"rank": [4, "8"]}}, "loramill.sweep"),
        ({"sweep": SWEEP, "executor": "dedicated"}, "loramill.executor"),
        ({"sweep": SWEEP, "targets": ["nothing"]}, "loramill.targets"),
    ],
)
def test_a_wrong_sweep_is_refused(
    client: OpenAI, files: dict[str, str], tenant: str, own: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="tiny", **files, extra_body={"loramill": own})
    assert refused.value.param == param
    assert not client.fine_tuning.jobs.list().data


def test_a_sweep_without_validation_data_is_refused(client: OpenAI, files: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(
            model="tiny", training_file=files["training_file"], extra_body={"loramill": {"sweep": SWEEP}}
        )
    assert refused.value.param == "validation_file"
