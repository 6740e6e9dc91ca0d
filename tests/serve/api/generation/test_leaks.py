"""A tenant learns nothing about another's objects: existing and unknown names get the same answer, headers included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from loramill.registry import api_keys
from loramill.types import Scope


@dataclass(frozen=True)
class Names:
    """Names of one object of each kind."""

    tenant: str
    adapter: str
    version: str
    file: str
    job: str
    key: str
    completion: str


@pytest.fixture
def theirs(site: Any, other: str, jsonl: Any) -> Names:
    version = site.publish(f"{other}/support", f"{other} one")
    with site.registry.writing() as session:
        key, secret = api_keys.create(session, other)
    with site.http(secret) as http:
        file = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", jsonl(5))}).json()["id"]
        job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()["id"]
        hello = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "store": True, "user": "ann"}
        with site.http(site.admin_key) as admin:
            admin.post(f"/v1/tenants/{other}/storage", json={"store_completions": True})
        completion = http.post("/v1/chat/completions", json=hello).json()["id"]
        http.post("/v1/feedback", json={"completion_id": completion, "correction": "their correction"})
    return Names(other, "support", version, file, job, key.id, completion)


@pytest.fixture
def unknown(theirs: Names) -> Names:
    """Names of the same lengths that do not exist."""

    def turned(text: str) -> str:
        kind, dash, rest = text.rpartition("-")
        return kind + dash + rest.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))

    return Names(
        theirs.tenant[:-1] + "z",
        "tropsup",
        turned(theirs.version),
        turned(theirs.file),
        turned(theirs.job),
        turned(theirs.key),
        turned(theirs.completion),
    )


def _requests(it: Names, mine: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests for what `it` names, to every endpoint that takes a name, and with every name that a body takes."""
    adapter, job = f"/v1/adapters/{it.tenant}/{it.adapter}", f"/v1/fine_tuning/jobs/{it.job}"
    own = f"/v1/adapters/{mine}/a"
    new = {"model": "tiny", "training_file": it.file}
    hello: Any = [{"role": "user", "content": "hi"}]
    named = [f"{it.tenant}/{it.adapter}", f"{it.tenant}/{it.adapter}@{it.version}", f"{mine}/a@{it.version[:12]}"]
    return [
        *(("POST", "/v1/chat/completions", {"json": {"model": name, "messages": hello}}) for name in named),
        *(("POST", "/v1/completions", {"json": {"model": name, "prompt": "hi", "stream": True}}) for name in named),
        *((verb, f"/v1/models/{name}", {}) for name in named for verb in ("GET", "DELETE")),
        *(
            ("GET", f"/v1/files/{file}{below}", {})
            for file in (it.file, f"file-results-{it.job}")
            for below in ("", "/content")
        ),
        ("GET", "/v1/files", {"params": {"after": it.file}}),
        ("DELETE", f"/v1/files/{it.file}", {}),
        ("POST", "/v1/fine_tuning/jobs", {"json": new}),
        ("POST", "/v1/fine_tuning/jobs/batch", {"json": {"jobs": [new]}}),
        ("POST", "/v1/fine_tuning/jobs/batch", {"json": {"jobs": [{**new, "tenant": it.tenant}]}}),
        ("GET", "/v1/fine_tuning/jobs", {"params": {"after": it.job}}),
        *(("GET", job + below, {}) for below in ("", "/events", "/checkpoints")),
        *(("POST", f"{job}/{verb}", {}) for verb in ("cancel", "pause", "resume", "retry")),
        *(("GET", adapter + below, {}) for below in ("", "/files", "/files/adapter_config.json")),
        *(("POST", f"{adapter}/{verb}", {}) for verb in ("rollback", "pin", "unpin", "warm")),
        ("POST", f"{adapter}/import", {"files": {"config": b"{}", "weights": b""}}),
        ("POST", f"{adapter}/promote", {"json": {"version": "champion"}}),
        ("POST", f"{adapter}/canary", {"json": {"share": 0.5}}),
        ("POST", f"{own}/canary", {"json": {"share": 0.5, "version": it.version}}),
        ("DELETE", f"{adapter}/canary", {}),
        ("POST", f"{adapter}/approval", {"json": {"run": "nightly-0", "decision": "approve"}}),
        ("POST", f"{adapter}/retention", {"json": {"retention": {"keep_versions": 1}}}),
        ("DELETE", adapter, {"params": {"cancel_jobs": "true"}}),
        ("DELETE", f"{adapter}/versions/{it.version}", {"params": {"force": "true"}}),
        ("DELETE", f"{own}/versions/{it.version}", {}),
        ("POST", f"{adapter}/rename", {"json": {"to": f"{mine}/b"}}),
        ("POST", f"{own}/rename", {"json": {"to": f"{it.tenant}/{it.adapter}"}}),
        ("GET", f"{adapter}/data", {}),
        ("POST", f"{adapter}/data", {"json": {"training_file": it.file}}),
        ("POST", f"{own}/data", {"json": {"training_file": it.file}}),
        *(("POST", f"{own}/{verb}", {"json": {"version": it.version}}) for verb in ("promote", "pin", "warm")),
        ("GET", f"{own}/files", {"params": {"version": it.version}}),
        ("GET", f"{own}/files/adapter_config.json", {"params": {"version": it.version}}),
        *((verb, f"/v1/chat/completions/{it.completion}", {}) for verb in ("GET", "DELETE")),
        ("GET", f"/v1/chat/completions/{it.completion}/messages", {}),
        ("POST", f"/v1/chat/completions/{it.completion}", {"json": {"metadata": {"a": "b"}}}),
        *((verb, f"/v1/completions/{it.completion}", {}) for verb in ("GET", "DELETE")),
        *(("GET", path, {"params": {"after": it.completion}}) for path in ("/v1/chat/completions", "/v1/completions")),
        ("GET", "/v1/feedback", {"params": {"after": it.completion}}),
        ("POST", "/v1/feedback", {"json": {"completion_id": it.completion, "rating": "bad"}}),
        ("DELETE", f"/v1/feedback/{it.completion}", {}),
        ("GET", f"/v1/tenants/{it.tenant}", {}),
        ("GET", f"/v1/tenants/{it.tenant}/keys", {}),
        *(("POST", f"/v1/tenants/{it.tenant}/{what}", {"json": {}}) for what in ("share", "limits", "storage", "keys")),
        ("POST", "/v1/tenants", {"json": {"name": it.tenant}}),
        ("DELETE", f"/v1/tenants/{it.tenant}", {"params": {"cancel_jobs": "true"}}),
        ("DELETE", f"/v1/keys/{it.key}", {}),
        ("GET", "/v1/usage", {"params": {"tenant": it.tenant}}),
        ("GET", "/v1/audit", {"params": {"tenant": it.tenant}}),
        ("GET", "/v1/models", {"headers": {"OpenAI-Organization": it.tenant}}),
    ]


def _visible(answer: httpx.Response, it: Names) -> tuple[int, str, dict[str, str]]:
    text = answer.text
    for name, value in vars(it).items():
        text = text.replace(value, f"<{name}>").replace(value[:12], f"<{name}>")
    headers = {name: "" if name in ("x-request-id", "date") else value for name, value in answer.headers.items()}
    return answer.status_code, text, headers


def test_existing_and_unknown_names_of_others_are_answered_alike(
    site: Any, http: httpx.Client, tenant: str, theirs: Names, unknown: Names, endpoints: list[tuple[str, str]]
) -> None:
    site.publish(f"{tenant}/a", f"{tenant} one")
    requested = set()
    for (method, path, how), (_, elsewhere, other_how) in zip(
        _requests(theirs, tenant), _requests(unknown, tenant), strict=True
    ):
        answer = http.request(method, path, **how)
        visible = _visible(answer, theirs)
        assert visible == _visible(http.request(method, elsewhere, **other_how), unknown), (method, path)
        # A batch answers 200 with an error for each job.
        assert answer.status_code in (400, 403, 404) or "batch" in path, (method, path, answer.text)
        requested.add((method, answer.request.url.path))
    naming = [(method, path) for method, path in endpoints if "*" in path]
    for method, path in naming:
        parts = path.split("*")
        assert any(
            verb == method and url.startswith(parts[0]) and url.endswith(parts[-1]) for verb, url in requested
        ), path


def test_requests_for_anothers_objects_change_nothing(
    site: Any, http: httpx.Client, tenant: str, theirs: Names
) -> None:
    with site.http(site.admin_key) as admin:
        paths = [
            f"/v1/adapters/{theirs.tenant}/{theirs.adapter}",
            f"/v1/fine_tuning/jobs/{theirs.job}",
            f"/v1/tenants/{theirs.tenant}",
            f"/v1/tenants/{theirs.tenant}/keys",
            f"/v1/files/{theirs.file}",
            f"/v1/chat/completions/{theirs.completion}",
            "/v1/feedback",
        ]
        before = [admin.get(path).text for path in paths]
        site.publish(f"{tenant}/a", f"{tenant} one")
        for method, path, how in _requests(theirs, tenant):
            http.request(method, path, **how)
        assert [admin.get(path).text for path in paths] == before


def test_a_key_without_the_scope_learns_nothing_either(site: Any, tenant: str, theirs: Names, unknown: Names) -> None:
    with site.registry.writing() as session:
        _, secret = api_keys.create(session, tenant, scopes=[Scope.INFERENCE])
    with site.http(secret) as http:
        for it in (theirs, unknown):
            answer = http.get(f"/v1/files/{it.file}")
            assert answer.status_code == 403 and "scope" in answer.json()["error"]["message"]


def test_a_tenant_sees_and_deletes_no_completion_or_feedback_of_another(
    site: Any, http: httpx.Client, tenant: str, theirs: Names
) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/feedback?texts=true"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["data"]) == (200, []), path
    for query in (f"adapter={theirs.tenant}/support", "user=ann"):
        assert http.get(f"/v1/feedback?{query}").json()["data"] == []
    assert http.delete("/v1/feedback?user=ann").json()["completions"] == 0
    with site.http(site.key(theirs.tenant)) as own:
        assert own.get(f"/v1/chat/completions/{theirs.completion}").status_code == 200
        assert [row["correction"] for row in own.get("/v1/feedback").json()["data"]] == ["their correction"]
