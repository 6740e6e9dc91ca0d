"""Files through the unmodified openai client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.registry import nightly


def test_upload_and_read_back(client: OpenAI, jsonl: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(5))
    with (tmp_path / "train.jsonl").open("rb") as file:
        made = client.files.create(file=file, purpose="fine-tune")
    assert (made.object, made.filename, made.purpose, made.status) == ("file", "train.jsonl", "fine-tune", "processed")
    assert made.bytes == len(jsonl(5)) and made.id.startswith("file-") and made.status_details is None
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == jsonl(5)
    assert client.files.wait_for_processing(made.id).status == "processed"


def test_warnings_come_back(client: OpenAI, jsonl: Any) -> None:
    made = client.files.create(file=("twice.jsonl", jsonl(5) + jsonl(2)), purpose="fine-tune")
    assert made.status_details is not None and "twice.jsonl" in made.status_details


def test_every_problem_is_reported(client: OpenAI, jsonl: Any) -> None:
    bad = jsonl(2) + b'{"messages": []}\nnot json\n' + jsonl(1, "x" * 600)
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("bad.jsonl", bad), purpose="fine-tune")
    assert caught.value.code == "invalid_dataset"
    problems = caught.value.body["message"].splitlines()[1:]  # type: ignore[index]
    assert [problem.partition(": ")[0] for problem in problems] == ["bad.jsonl, line 3", "bad.jsonl, line 4"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("long.jsonl", jsonl(2) + jsonl(1, "x" * 600)), purpose="fine-tune")
    assert "long.jsonl, line 3" in caught.value.message and "512" in caught.value.message


def test_a_check_trains_on_what_a_job_with_the_same_option_trains_on(client: OpenAI) -> None:
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "last")]
    weight = {"user": {}, "assistant": {"weight": 1}}
    messages = [{"role": role, "content": text} | weight[role] for role, text in turns]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for _ in range(4))
    found = httpx.post(
        f"{client.base_url}files/check",
        headers=client.auth_headers,
        data={"train_on": "last"},
        files={"file": ("chats.jsonl", lines.encode())},
    ).json()
    supervised = "".join(part["text"] for part in found["preview"] if part["supervised"])
    assert "last" in supervised and "first" not in supervised


def test_pages(client: OpenAI, jsonl: Any) -> None:
    made = [client.files.create(file=(f"{i}.jsonl", jsonl(4, f"w{i}")), purpose="fine-tune").id for i in range(5)]
    assert [file.id for file in client.files.list()] == made[::-1]
    first = client.files.list(limit=2, purpose="fine-tune", order="desc")
    assert [file.id for file in first.data] == made[:2:-1] and first.has_next_page()
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert not client.files.list(after=made[0]).data
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")
    for bad in ({"limit": 0}, {"limit": "x"}, {"order": "asc"}, {"purpose": "vision"}, {"extra_query": {"x": 1}}):
        with pytest.raises(openai.BadRequestError):
            client.files.list(**bad)  # type: ignore[arg-type]


def test_another_tenants_file_is_not_found(client: OpenAI, admin: OpenAI, site: Any, other: str, jsonl: Any) -> None:
    foreign = site.openai(site.key(other)).files.create(file=("a.jsonl", jsonl(4)), purpose="fine-tune").id
    for name in (foreign, "file-none"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.files.retrieve(name)
        assert caught.value.code == "not_found"
        with pytest.raises(openai.NotFoundError):
            client.files.content(name)
    assert not client.files.list().data
    assert admin.files.retrieve(foreign).id == foreign


def test_refused_fields_are_named(client: OpenAI, http: httpx.Client, jsonl: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("a.jsonl", jsonl(4)), purpose="vision")
    assert caught.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(
            file=("a.jsonl", jsonl(4)), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert caught.value.param is not None and "expires_after" in caught.value.param
    assert caught.value.code == "unsupported_parameter"
    missing = http.post("/v1/files", data={"purpose": "fine-tune"}, files={})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "file")
    text = http.post("/v1/files", data={"purpose": "fine-tune", "file": "not a file"})
    assert (text.status_code, text.json()["error"]["param"]) == (400, "file")
    assert http.post("/v1/files", json={"purpose": "fine-tune"}).status_code == 400
    assert http.post("/v1/files", content=b"--x", headers={"content-type": "multipart/form-data"}).status_code == 400


def test_an_upload_is_bounded(client: OpenAI, http: httpx.Client, site: Any, jsonl: Any) -> None:
    large = jsonl(5000)
    assert len(large) > site.settings.serve.max_upload_bytes
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("large.jsonl", large), purpose="fine-tune")
    assert caught.value.status_code == 413 and "MiB" in caught.value.message

    def unannounced() -> Any:
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert http.post("/v1/files", content=unannounced(), headers=kind).status_code == 413
    assert not client.files.list().data


def test_a_name_is_only_a_name(client: OpenAI, jsonl: Any) -> None:
    made = client.files.create(file=("../../etc/passwd", jsonl(4)), purpose="fine-tune")
    assert made.filename == "passwd"


def test_the_same_content_is_one_file_on_request(
    http: httpx.Client, site: Any, client: OpenAI, other: str, jsonl: Any
) -> None:
    def made(name: str, content: bytes, by: httpx.Client = http, **form: str) -> str:
        sent = by.post("/v1/files", data={"purpose": "fine-tune", **form}, files={"file": (name, content)})
        assert sent.status_code == 200, sent.text
        return str(sent.json()["id"])

    first = made("a.jsonl", jsonl(5))
    assert made("a.jsonl", jsonl(5)) != first
    assert made("b.jsonl", jsonl(5), reuse="true") == first
    assert made("a.jsonl", jsonl(6), reuse="true") != first
    with site.http(site.key(other)) as theirs:
        assert made("a.jsonl", jsonl(5), theirs, reuse="true") != first
    assert len(client.files.list().data) == 3


def test_a_file_that_is_deleted_is_gone(client: OpenAI, site: Any, other: str, jsonl: Any) -> None:
    made = client.files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune").id
    with pytest.raises(openai.NotFoundError):
        site.openai(site.key(other)).files.delete(made)
    deleted = client.files.delete(made)
    assert (deleted.id, deleted.deleted, deleted.object) == (made, True, "file")
    with pytest.raises(openai.NotFoundError):
        client.files.delete(made)
    assert client.files.list().data == []


def test_a_file_that_a_nightly_run_needs_stays(
    client: OpenAI, http: httpx.Client, site: Any, tenant: str, jsonl: Any
) -> None:
    train, valid = (client.files.create(file=(f"{i}.jsonl", jsonl(5)), purpose="fine-tune").id for i in range(2))
    added = http.post(f"/v1/adapters/{tenant}/a/data", json={"training_file": train, "validation_file": valid})
    assert added.status_code == 200, added.text
    with site.registry.writing() as session:
        run = nightly.open_run(session)
    for file in (train, valid):
        with pytest.raises(openai.ConflictError, match=f"{tenant}/a"):
            client.files.delete(file)
    with site.registry.writing() as session:
        nightly.collect(session, run.id, f"{tenant}/a")
    with pytest.raises(openai.ConflictError):
        client.files.delete(train)
    with site.registry.writing() as session:
        nightly.finish_run(session, run.id)
    assert client.files.delete(train).deleted and client.files.delete(valid).deleted


def test_results_of_an_unknown_job_are_not_found(client: OpenAI) -> None:
    for read in (client.files.retrieve, client.files.content):
        with pytest.raises(openai.NotFoundError):
            read("file-results-ftjob-none")
