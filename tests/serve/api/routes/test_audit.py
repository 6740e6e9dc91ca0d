"""The audit: every endpoint that changes something leaves a row, and no row contains a secret or a prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI

from loramill.registry import adapters, api_keys, audit, jobs
from loramill.types import AuditRecord

from ....loramill.registry.waiting_challengers import ask
from ....waiting import eventually
from .adapters.test_adapter_imports import form

HELLO: Any = [{"role": "user", "content": "a word that must not be logged"}]

#: Endpoints that change nothing lasting: generation, which is counted as usage, and a check of data.
GENERATION = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/files/check"}


@dataclass
class Stage:
    """A tenant with one object of each kind, and the clients that act on it."""

    site: Any
    tenant: str
    admin: httpx.Client
    own: httpx.Client
    file: str
    unused: str
    job: str
    key: str

    def submit(self) -> dict[str, Any]:
        return {"model": "tiny", "training_file": self.file, "suffix": "a"}


@pytest.fixture
def stage(site: Any, tenant: str, jsonl: Any) -> Iterator[Stage]:
    for number in range(2):
        site.publish(f"{tenant}/a", f"{tenant} {number}")
    with site.registry.writing() as session:
        key, _ = api_keys.create(session, tenant)
    with site.http(site.admin_key) as admin, site.http(site.key(tenant)) as own:
        files = [
            own.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", jsonl(5))}).json()["id"]
            for _ in range(2)
        ]
        job = own.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": files[0]}).json()["id"]
        yield Stage(site, tenant, admin, own, *files, job, key.id)


def _pausing(stage: Stage) -> httpx.Response:
    with stage.site.registry.writing() as session:
        jobs.pause(session, stage.job)
    return stage.own.post(f"/v1/fine_tuning/jobs/{stage.job}/resume")


def _retrying(stage: Stage) -> httpx.Response:
    with stage.site.registry.writing() as session:
        jobs.cancel(session, stage.job)
    return stage.own.post(f"/v1/fine_tuning/jobs/{stage.job}/retry")


def _rolling_back(stage: Stage) -> httpx.Response:
    stage.own.post(f"/v1/adapters/{stage.tenant}/a/promote", json={"version": "challenger"})
    return stage.own.post(f"/v1/adapters/{stage.tenant}/a/rollback")


def _ending_a_canary(stage: Stage) -> httpx.Response:
    stage.own.post(f"/v1/adapters/{stage.tenant}/a/canary", json={"share": 0.1})
    return stage.own.delete(f"/v1/adapters/{stage.tenant}/a/canary")


def _deleting_a_version(stage: Stage) -> httpx.Response:
    [challenger] = [row["challenger"] for row in stage.own.get("/v1/adapters").json()["data"] if row["challenger"]]
    return stage.own.delete(f"/v1/adapters/{stage.tenant}/a/versions/{challenger}", params={"force": "true"})


def _pruning(stage: Stage) -> httpx.Response:
    stage.site.publish(f"{stage.tenant}/a", f"{stage.tenant} 2")  # nothing refers to the challenger before any more
    stage.own.post(f"/v1/adapters/{stage.tenant}/a/retention", json={"retention": {"keep_versions": 1}})
    return stage.own.post("/v1/adapters/prune")


def _storing(stage: Stage, prompt: dict[str, Any] | None = None) -> str:
    """Stores a completion; returns its ID."""
    stage.admin.post(f"/v1/tenants/{stage.tenant}/storage", json={"store_completions": True})
    path = "/v1/chat/completions" if prompt is None else "/v1/completions"
    body = {"model": "tiny", "store": True, **({"messages": HELLO} if prompt is None else prompt)}
    return str(stage.own.post(path, json=body).json()["id"])


def _rating(stage: Stage, completion: str) -> httpx.Response:
    return stage.own.post("/v1/feedback", json={"completion_id": completion, "rating": "good"})


def _approving(stage: Stage) -> httpx.Response:
    with stage.site.registry.writing() as session:
        found = adapters.get(session, f"{stage.tenant}/a")
        waiting = ask(session, f"{stage.tenant}/a", found.challenger, found.champion)
    return stage.own.post(f"/v1/adapters/{stage.tenant}/a/approval", json={"run": waiting.run, "decision": "approve"})


#: How each endpoint is called, its action in the audit, and whether an admin calls it.
CALLS: dict[str, tuple[Callable[[Stage], httpx.Response], str, bool]] = {
    "POST /v1/tenants": (lambda s: s.admin.post("/v1/tenants", json={"name": f"{s.tenant}-b"}), "tenant.create", True),
    "POST /v1/tenants/batch": (
        lambda s: s.admin.post("/v1/tenants/batch", json={"tenants": [{"name": f"{s.tenant}-b"}]}),
        "tenant.create",
        True,
    ),
    "POST /v1/tenants/*/share": (
        lambda s: s.admin.post(f"/v1/tenants/{s.tenant}/share", json={"weight": 2}),
        "tenant.share",
        True,
    ),
    "POST /v1/tenants/*/limits": (
        lambda s: s.admin.post(f"/v1/tenants/{s.tenant}/limits", json={"stored_bytes": 10**9}),
        "tenant.limits",
        True,
    ),
    "POST /v1/tenants/*/storage": (
        lambda s: s.admin.post(f"/v1/tenants/{s.tenant}/storage", json={"store_completions": True}),
        "tenant.storage",
        True,
    ),
    "POST /v1/chat/completions/*": (
        lambda s: s.own.post(f"/v1/chat/completions/{_storing(s)}", json={"metadata": {"a": "b"}}),
        "completion.update",
        False,
    ),
    "DELETE /v1/chat/completions/*": (
        lambda s: s.own.delete(f"/v1/chat/completions/{_storing(s)}"),
        "completion.delete",
        False,
    ),
    "DELETE /v1/completions/*": (
        lambda s: s.own.delete(f"/v1/completions/{_storing(s, {'prompt': 'hi'})}"),
        "completion.delete",
        False,
    ),
    "POST /v1/feedback": (lambda s: _rating(s, _storing(s)), "feedback.give", False),
    "DELETE /v1/feedback": (lambda s: s.own.delete("/v1/feedback?user=ann"), "feedback.delete_user", False),
    "DELETE /v1/feedback/*": (
        lambda s: s.own.delete(f"/v1/feedback/{_rating(s, _storing(s)).json()['completion_id']}"),
        "feedback.delete",
        False,
    ),
    "POST /v1/tenants/*/keys": (lambda s: s.admin.post(f"/v1/tenants/{s.tenant}/keys"), "key.create", True),
    "DELETE /v1/keys/*": (lambda s: s.admin.delete(f"/v1/keys/{s.key}"), "key.revoke", True),
    "POST /v1/files": (
        lambda s: s.own.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", s.own.get(_content(s)).content)}
        ),
        "file.create",
        False,
    ),
    "DELETE /v1/files/*": (lambda s: s.own.delete(f"/v1/files/{s.unused}"), "file.delete", False),
    "POST /v1/fine_tuning/jobs": (
        lambda s: s.own.post("/v1/fine_tuning/jobs", json=s.submit()),
        "job.create",
        False,
    ),
    "POST /v1/fine_tuning/jobs/batch": (
        lambda s: s.own.post("/v1/fine_tuning/jobs/batch", json={"jobs": [s.submit()]}),
        "job.create",
        False,
    ),
    "POST /v1/fine_tuning/jobs/*/cancel": (
        lambda s: s.own.post(f"/v1/fine_tuning/jobs/{s.job}/cancel"),
        "job.cancel",
        False,
    ),
    "POST /v1/fine_tuning/jobs/*/pause": (
        lambda s: s.own.post(f"/v1/fine_tuning/jobs/{s.job}/pause"),
        "job.pause",
        False,
    ),
    "POST /v1/fine_tuning/jobs/*/resume": (_pausing, "job.resume", False),
    "POST /v1/fine_tuning/jobs/*/retry": (_retrying, "job.retry", False),
    "POST /v1/adapters/*/*/promote": (
        lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/promote", json={"version": "challenger"}),
        "adapter.promote",
        False,
    ),
    "POST /v1/adapters/*/*/approval": (_approving, "adapter.approve", False),
    "POST /v1/adapters/*/*/rollback": (_rolling_back, "adapter.rollback", False),
    "POST /v1/adapters/*/*/pin": (lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/pin"), "adapter.pin", False),
    "POST /v1/adapters/*/*/canary": (
        lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/canary", json={"share": 0.1}),
        "adapter.canary",
        False,
    ),
    "DELETE /v1/adapters/*/*/canary": (_ending_a_canary, "adapter.canary_end", False),
    "POST /v1/adapters/*/*/unpin": (lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/unpin"), "adapter.unpin", False),
    "POST /v1/adapters/*/*/warm": (lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/warm"), "adapter.warm", False),
    "POST /v1/adapters/*/*/data": (
        lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/data", json={"training_file": s.file}),
        "adapter.data",
        False,
    ),
    "POST /v1/adapters/*/*/import": (
        lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/import", files=form()),
        "adapter.import",
        False,
    ),
    "POST /v1/adapters/*/*/rename": (
        lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/rename", json={"to": f"{s.tenant}/b"}),
        "adapter.rename",
        False,
    ),
    "POST /v1/adapters/*/*/retention": (
        lambda s: s.own.post(f"/v1/adapters/{s.tenant}/a/retention", json={}),
        "adapter.retention",
        False,
    ),
    "POST /v1/adapters/prune": (_pruning, "adapter.prune", False),
    "DELETE /v1/adapters/*/*": (lambda s: s.own.delete(f"/v1/adapters/{s.tenant}/a"), "adapter.delete", False),
    "DELETE /v1/adapters/*/*/versions/*": (_deleting_a_version, "version.delete", False),
    "DELETE /v1/models/*": (lambda s: s.own.delete(f"/v1/models/{s.tenant}/a"), "adapter.delete", False),
    "DELETE /v1/tenants/*": (
        lambda s: s.admin.delete(f"/v1/tenants/{s.tenant}", params={"cancel_jobs": "true"}),
        "tenant.delete",
        True,
    ),
}


def _content(stage: Stage) -> str:
    return f"/v1/files/{stage.file}/content"


def _rows(site: Any) -> list[AuditRecord]:
    with site.registry.reading() as session:
        return audit.list_changes(session, None, limit=10_000)


def test_every_endpoint_that_changes_something_is_listed(endpoints: list[tuple[str, str]]) -> None:
    changing = {f"{method} {path}" for method, path in endpoints if method != "GET"}
    assert changing == CALLS.keys() | GENERATION


@pytest.mark.parametrize("endpoint", CALLS)
def test_a_change_leaves_a_row(stage: Stage, endpoint: str) -> None:
    call, action, by_admin = CALLS[endpoint]
    before = {row.id for row in _rows(stage.site)}
    answer = call(stage)
    assert answer.status_code == 200, answer.text
    # Some are preceded by another change that makes them possible.
    [row] = [row for row in _rows(stage.site) if row.id not in before and row.action == action]
    assert row.request == answer.headers["x-request-id"]
    owners = {"tenant.create": f"{stage.tenant}-b", "tenant.delete": None}
    assert row.tenant == owners.get(action, stage.tenant)
    assert row.actor == (None if by_admin else stage.tenant)
    assert row.key.startswith("key-") and row.subject
    other_ids = ("tenant", "adapter.rename", "adapter.canary", "version.delete")
    if "id" in answer.json() and not action.startswith(other_ids):
        assert row.subject == answer.json()["id"]
    if "key" in answer.json():
        assert answer.json()["key"] not in str(row)


@pytest.mark.parametrize("refused", ["promote", "limits", "file"])
def test_a_refused_request_leaves_no_row(stage: Stage, refused: str) -> None:
    before = len(_rows(stage.site))
    answer = {
        "promote": lambda: stage.own.post(f"/v1/adapters/{stage.tenant}/a/promote", json={"version": "0123456789"}),
        "limits": lambda: stage.own.post(f"/v1/tenants/{stage.tenant}/limits", json={}),
        "file": lambda: stage.own.delete(f"/v1/files/{stage.file}"),  # a job needs it
    }[refused]()
    assert answer.status_code >= 400
    assert len(_rows(stage.site)) == before


def test_the_audit_is_paginated_and_limited_to_the_caller(stage: Stage, tenant: str, other: str) -> None:
    stage.admin.post(f"/v1/tenants/{tenant}/limits", json={"requests_per_minute": 7})
    stage.admin.post(f"/v1/tenants/{other}/limits", json={"requests_per_minute": 8})
    newest, *rest = stage.own.get("/v1/audit", params={"limit": 2}).json()["data"]
    assert (newest["object"], newest["action"], newest["actor"]) == ("audit.change", "tenant.limits", None)
    assert newest["details"]["requests_per_minute"] == 7
    following = stage.own.get("/v1/audit", params={"limit": 2, "after": rest[0]["id"]}).json()
    assert following["data"] and newest["id"] not in str(following)
    assert {row["tenant"] for row in stage.own.get("/v1/audit").json()["data"]} == {tenant}
    of_other = stage.admin.get("/v1/audit", params={"tenant": other}).json()["data"]
    assert [row["details"]["requests_per_minute"] for row in of_other] == [8]
    assert {tenant, other} <= {row["tenant"] for row in stage.admin.get("/v1/audit").json()["data"]}
    assert stage.own.get("/v1/audit", params={"tenant": other}).status_code == 403
    assert stage.admin.get("/v1/audit", params={"tenant": "unknown"}).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_neither_logged_nor_audited(
    site: Any, client: OpenAI, tenant: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def ours() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name.startswith(("loramill", "uvicorn", "sqlalchemy"))]

    site.publish(f"{tenant}/a", f"{tenant} one")
    with caplog.at_level(logging.DEBUG):
        answer = client.chat.completions.create(model=f"{tenant}/a", messages=HELLO, stream=stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else str(answer)
        client.completions.create(model="tiny", prompt=HELLO[0]["content"])
        with pytest.raises(Exception, match="nothing-such"):
            client.chat.completions.create(model=f"{tenant}/nothing-such", messages=HELLO)
        eventually(lambda: len(ours()) >= 3)  # a record follows the last byte of its answer
    assert "must not be" in text
    assert not [record for record in ours() if "must not be" in f"{record.getMessage()} {record.__dict__}"]
    assert "must not be" not in str(_rows(site))
