"""Hundreds of jobs in one request: all are submitted, or none."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

from loramill.data.examples import read_examples
from loramill.registry import jobs, tenants
from loramill.types import JobStatus

PATH = "/v1/fine_tuning/jobs/batch"


@pytest.fixture
def file(client: OpenAI, jsonl: Any) -> str:
    return client.files.create(file=("train.jsonl", jsonl(40)), purpose="fine-tune").id


@pytest.fixture
def admin(site: Any) -> Any:
    with site.http(site.admin_key) as http:
        yield http


def job(file: str, key: str | None = None, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": file, "metadata": {"loramill_key": key} if key else {}, **more}


def sent(http: httpx.Client, *jobs: dict[str, Any], **more: Any) -> tuple[bool, list[Any]]:
    response = http.post(PATH, json={"jobs": jobs, **more})
    assert response.status_code == 200, response.text
    return response.json()["submitted"], response.json()["data"]


def test_all_are_submitted(http: httpx.Client, client: OpenAI, file: str) -> None:
    submitted, data = sent(http, *(job(file, suffix=f"a{i}", loramill={"steps": 40 + i}) for i in range(120)))
    assert submitted and all(entry["new"] and entry["error"] is None for entry in data)
    assert [entry["job"]["loramill"]["steps"] for entry in data] == [*range(40, 160)]
    assert {entry["job"]["id"] for entry in data} == {each.id for each in client.fine_tuning.jobs.list(limit=100)}


def test_one_invalid_job_stops_all(http: httpx.Client, client: OpenAI, file: str) -> None:
    wrong: list[tuple[Any, str | None, str]] = [
        (job(file, seed=-1), "seed", "invalid_request"),
        (job(file, suffix="Not A Name"), "suffix", "invalid_request"),
        (job("file-none"), "training_file", "invalid_request"),
        ({"training_file": file}, "model", "invalid_request"),
        (job(file, loramill={"wibble": 1}), "loramill.wibble", "unsupported_parameter"),
        (job(file, loramill={"targets": ["nose"]}), "loramill.targets", "invalid_request"),
        (job(file, tenant=3), "tenant", "invalid_request"),
        (job(file, tenant="somebody-else"), None, "forbidden"),
    ]
    submitted, data = sent(http, job(file), *(each for each, _, _ in wrong))
    assert not submitted and [entry["job"] for entry in data] == [None] * 9
    assert data[0]["error"] is None
    assert [(entry["error"]["param"], entry["error"]["code"]) for entry in data[1:]] == [
        (param, code) for _, param, code in wrong
    ]
    assert client.fine_tuning.jobs.list().data == []
    assert sent(http, job(file), check_only=True)[0] is False
    assert client.fine_tuning.jobs.list().data == []


def test_a_submitted_key_is_not_submitted_again(
    http: httpx.Client, site: Any, client: OpenAI, file: str, other: str, jsonl: Any
) -> None:
    theirs = site.openai(site.key(other)).files.create(file=("a.jsonl", jsonl(10)), purpose="fine-tune").id
    with site.http(site.key(other)) as foreign:
        assert sent(foreign, job(theirs, "one"))[1][0]["new"]  # the same key of another tenant is another job
    first = sent(http, job(file, "one"), job(file))[1]
    again = sent(http, job(file, "one"), job(file, "two"), job(file))[1]
    assert [entry["new"] for entry in again] == [False, True, True]
    assert again[0]["job"]["id"] == first[0]["job"]["id"]
    assert sent(http, job(file, "one"), check_only=True)[1][0]["job"]["id"] == first[0]["job"]["id"]
    client.fine_tuning.jobs.cancel(first[0]["job"]["id"])
    assert not sent(http, job(file, "one"))[1][0]["new"]
    assert sent(http, job(file, "one"), retry=True)[1][0]["new"]
    assert not sent(http, job(file, "one"), retry=True)[1][0]["new"]


def test_a_quota_stops_all(http: httpx.Client, site: Any, client: OpenAI, tenant: str, file: str) -> None:
    with site.registry.writing() as session:
        tenants.set_fair_share(session, tenant, max_queued=2)
    submitted, data = sent(http, job(file), job(file), job(file))
    assert not submitted and [bool(entry["error"]) for entry in data] == [False, False, True]
    assert data[2]["error"]["code"] == "quota_exceeded"
    assert [entry["job"] for entry in data] == [None] * 3 and client.fine_tuning.jobs.list().data == []
    assert sent(http, job(file), job(file))[0]


def test_an_admin_submits_for_many(
    admin: httpx.Client, site: Any, client: OpenAI, tenant: str, other: str, file: str, jsonl: Any
) -> None:
    theirs = site.openai(site.key(other)).files.create(file=("a.jsonl", jsonl(10)), purpose="fine-tune").id
    submitted, data = sent(admin, job(file, tenant=tenant), job(theirs, tenant=other))
    assert submitted and [entry["job"]["organization_id"] for entry in data] == [tenant, other]
    assert not sent(admin, job(file, tenant=other))[0]  # it isn't theirs
    assert "OpenAI-Organization" in sent(admin, job(file))[1][0]["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"jobs": []}, {"jobs": [3]}, {"jobs": [{}], "wibble": 1}])
def test_malformed_batches_are_refused(http: httpx.Client, body: Any) -> None:
    assert http.post(PATH, json=body).status_code == 400


def test_a_file_is_read_once(http: httpx.Client, site: Any, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def reading(raw: bytes, name: str) -> Any:
        read.append(name)
        return read_examples(raw, name)

    monkeypatch.setattr("loramill.submission.dataset_checks.read_examples", reading)
    assert sent(http, *(job(file) for _ in range(30)))[0]
    assert len(read) <= 1
    with site.registry.reading() as session:
        assert jobs.list_jobs(session, tenant=None, limit=1)[0].status is JobStatus.QUEUED
