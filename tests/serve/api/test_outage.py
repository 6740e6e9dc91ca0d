"""The gateway during an outage of its database or its store, and its messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from loramill.registry import Registry, api_keys, jobs, migrate, tenants
from loramill.serve.api.app import build_api

from ... import switchable_store
from ...postgresql import PostgreSQL

#: Parts of a database's URL and of libpq's messages about it.
SECRETS = ("postgresql", "127.0.0.1", "loramill@", "port", "refused", "server", "psycopg")


def chat(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return http.post("/v1/chat/completions", json=body)


def upload(http: httpx.Client, content: bytes) -> httpx.Response:
    return http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", content)})


def check_unavailable(answer: httpx.Response) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
    assert int(answer.headers["retry-after"]) >= 1
    return str(answer.json()["error"]["message"])


def test_endpoints_answer_without_postgresql_and_do_not_reveal_its_address(
    site: Any, serving: Callable[..., Any], jsonl: Any
) -> None:
    with PostgreSQL.installed() as server:
        server.start()
        url = f"{server.url}/postgres"
        migrate(url)
        registry = Registry.open(url, site.settings.artifacts)
        with registry.writing() as session:
            tenants.create(session, "acme")
            _, secret = api_keys.create(session, "acme")
            _, admin = api_keys.create(session, None)
        own_site = replace(site, registry=registry)
        app = build_api(
            registry=registry, base=site.base, tokenizer=site.tokenizer, backend=site.backend, settings=site.settings
        )
        version = own_site.publish("acme/support", "acme one")
        own_site.publish("acme/uncached", "acme two")
        names = ("tiny", "acme/support", f"acme/support@{version[:12]}")
        with serving(app) as address, replace(own_site, url=address).http(secret) as http:
            assert [chat(http, name).status_code for name in names] == [200, 200, 200]
            server.stop()
            for _ in range(3):
                assert [chat(http, name).status_code for name in names] == [200, 200, 200]
            assert http.get("/health").status_code == http.get("/healthz").status_code == 200
            with (
                replace(own_site, url=address).http(admin) as unknown,
                replace(own_site, url=address).http() as anonymous,
            ):
                refused = [
                    chat(http, "acme/uncached"),
                    chat(unknown, "tiny"),
                    anonymous.get("/readyz"),
                    http.get("/v1/fine_tuning/jobs"),
                    http.get("/v1/files"),
                    upload(http, jsonl(5)),
                ]
            for answer in refused:
                message = check_unavailable(answer)
                assert not [secret for secret in SECRETS if secret in message.lower()], message
            server.start()
            assert chat(http, "acme/uncached").status_code == http.get("/readyz").status_code == 200
            assert upload(http, jsonl(5)).status_code == 200
        registry.close()


@pytest.fixture
def switchable(site: Any, tmp_path: Any, serving: Callable[..., Any]) -> Iterator[Any]:
    """The site, with a store that can be switched off."""
    switchable_store.clear()
    registry = Registry.open(site.settings.database, "switched://key:secret@bucket/loramill")
    app = build_api(
        registry=registry, base=site.base, tokenizer=site.tokenizer, backend=site.backend, settings=site.settings
    )
    with serving(app) as url:
        yield replace(site, url=url, registry=registry)
    registry.close()
    switchable_store.clear()


def test_an_unavailable_store_is_named_and_retried(switchable: Any, tenant: str, jsonl: Any) -> None:
    with switchable.http(switchable.key(tenant)) as http:
        with switchable_store.off(switchable_store.away):
            message = check_unavailable(upload(http, jsonl(5)))
        assert "switched://bucket/loramill" in message
        assert "secret" not in message and "10.1.2.3" not in message
        file = upload(http, jsonl(5)).json()["id"]
        new = {"model": "tiny", "training_file": file}
        with switchable_store.off(switchable_store.away):
            check_unavailable(http.post("/v1/fine_tuning/jobs", json=new))
            check_unavailable(http.get(f"/v1/files/{file}/content"))
        assert http.post("/v1/fine_tuning/jobs", json=new).status_code == 200


def test_the_reason_of_a_store_that_refuses_is_given(switchable: Any, tenant: str, jsonl: Any) -> None:
    refusals = {
        "NoSuchBucket": (FileNotFoundError("?"), 404, "bucket does not exist"),
        "SignatureDoesNotMatch": (PermissionError("?"), 403, "credentials"),
        "AccessDenied": (PermissionError("?"), 403, "permission to read or write"),
    }
    with switchable.http(switchable.key(tenant)) as http:
        for code, (error, status, reason) in refusals.items():
            with switchable_store.off(
                lambda error=error, code=code, status=status: switchable_store.translated(error, code, status)
            ):
                answer = upload(http, jsonl(5, code))
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "store_unusable")
            assert reason in answer.json()["error"]["message"]


def test_a_failed_job_is_retried_over_http(site: Any, tenant: str, http: httpx.Client, jsonl: Any) -> None:
    file = upload(http, jsonl(5)).json()["id"]
    job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()["id"]
    path = f"/v1/fine_tuning/jobs/{job}"
    refused = http.post(f"{path}/retry")
    assert refused.status_code == 409 and "neither failed nor cancelled" in refused.json()["error"]["message"]
    http.post(f"{path}/cancel")
    assert "loramill jobs retry" in http.post(f"{path}/resume").json()["error"]["message"]
    again = http.post(f"{path}/retry").json()
    assert (again["status"], again["error"], again["loramill"]["waits_for"]) == ("queued", None, None)


def test_a_job_of_another_base_reports_what_it_waits_for(
    site: Any, tenant: str, http: httpx.Client, jsonl: Any
) -> None:
    file = upload(http, jsonl(5)).json()["id"]
    job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()
    base = hashlib.sha256(b"another").hexdigest()
    with site.registry.writing() as session:
        spec = jobs.get(session, job["id"]).spec.model_copy(update={"base": base})
        foreign = jobs.submit(session, spec, {}).id
    shown = http.get(f"/v1/fine_tuning/jobs/{foreign}").json()
    assert shown["loramill"]["waits_for"] == f"base {base[:12]}, which is not served here"
    listed = {each["id"]: each["loramill"]["waits_for"] for each in http.get("/v1/fine_tuning/jobs").json()["data"]}
    assert listed == {job["id"]: None, foreign: shown["loramill"]["waits_for"]}
