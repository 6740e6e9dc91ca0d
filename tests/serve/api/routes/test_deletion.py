"""Deleting and renaming over HTTP and with OpenAI's client: the answers, and the names that stop working."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.registry import api_keys, deletion, jobs, tenants
from loramill.registry.database.tables import JobRow
from loramill.serve.api import cache
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend
from loramill.types import JobStatus, Scope

HELLO: Any = [{"role": "user", "content": "one two three"}]


def test_openais_client_deletes_a_model(client: OpenAI, site: Any, tenant: str, echo: EchoBackend) -> None:
    name = f"{tenant}/support"
    old = site.publish(name, f"{tenant} one")
    client.chat.completions.create(model=name, messages=HELLO)
    deleted = client.models.delete(name)
    assert (deleted.id, deleted.object, deleted.deleted) == (name, "model", True)
    for model in (name, f"{name}@{old}", f"{name}@champion"):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=model, messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
        with pytest.raises(openai.NotFoundError):
            client.models.delete(model)
    assert name not in [model.id for model in client.models.list().data]
    # A new adapter of this name is another version; no name reaches the old one, nor its slot and KV.
    new = site.publish(name, f"{tenant} two")
    client.chat.completions.create(model=name, messages=HELLO)
    assert [request.version for request in echo.requests] == [old, new]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{name}@{old}", messages=HELLO)


def test_openais_client_deletes_a_version_without_an_alias(
    client: OpenAI, http: httpx.Client, site: Any, tenant: str
) -> None:
    name = f"{tenant}/support"
    versions = [site.publish(name, f"{tenant} {number}") for number in range(4)]
    http.post(f"/v1/adapters/{name}/promote", json={"version": versions[2]})
    for version, alias in ((versions[2], "champion"), (versions[0], "previous"), (versions[3], "challenger")):
        with pytest.raises(openai.ConflictError, match=alias):
            client.models.delete(f"{name}@{version[:12]}")
    deleted = client.models.delete(f"{name}@{versions[1][:12]}")
    assert deleted.deleted and deleted.id == f"{name}@{versions[1][:12]}"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{name}@{versions[1]}", messages=HELLO)
    forced = http.delete(f"/v1/adapters/{name}/versions/{versions[3][:8]}", params={"force": "true"}).json()
    assert forced == {"id": f"{name}@{versions[3]}", "object": "adapter.version", "deleted": True}
    refused = http.delete(f"/v1/adapters/{name}/versions/champion", params={"force": "true"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert http.get(f"/v1/adapters/{name}").json()["challenger"] is None


def test_only_adapters_are_deleted(client: OpenAI, tenant: str, other: str) -> None:
    with pytest.raises(openai.BadRequestError, match="is a base"):
        client.models.delete("tiny")
    with pytest.raises(openai.NotFoundError):
        client.models.delete("no-such-base")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(f"{other}/support")


def test_every_gateway_refuses_what_was_deleted_within_a_second(
    client: OpenAI, site: Any, twin: Any, tenant: str
) -> None:
    name, key = f"{tenant}/support", site.key(tenant)
    site.publish(name, f"{tenant} one")
    with twin.openai(key) as elsewhere:
        elsewhere.chat.completions.create(model=name, messages=HELLO)  # both name and key are cached there now
        client.models.delete(name)
        refused_after(lambda: elsewhere.chat.completions.create(model=name, messages=HELLO), openai.NotFoundError)
        with site.http(site.admin_key) as admin:
            assert admin.delete(f"/v1/tenants/{tenant}").json()["deleted"]
        refused_after(elsewhere.models.list, openai.AuthenticationError)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def refused_after(send: Any, error: type[Exception]) -> None:
    """Expects a refusal of the first request after the gateway's cache entries have expired."""
    time.sleep(cache.TTL_SECONDS)
    with pytest.raises(error):
        send()


class Deleting(EchoBackend):
    """Runs something between the first token and the second."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self._act = act

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:  # type: ignore[override]
        async for chunk in super().generate(request):
            yield chunk
            if chunk.completion_tokens == 1:
                self._act()


def test_a_request_in_flight_ends_with_its_version(client: OpenAI, site: Any, tenant: str) -> None:
    name = f"{tenant}/support"
    version = site.publish(name, f"{tenant} one")

    def delete() -> None:
        with site.registry.writing() as session:
            deletion.delete_tenant(session, tenant)

    site.backend.now = backend = Deleting(delete)
    answer = client.chat.completions.create(model=name, messages=HELLO)
    assert answer.choices[0].message.content == "one two three"
    assert [request.version for request in backend.requests] == [version]
    with pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model=name, messages=HELLO)


def test_a_job_that_has_not_ended_is_named_and_cancelled_on_request(
    client: OpenAI, http: httpx.Client, site: Any, tenant: str, jsonl: Any
) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune").id
    name = f"{tenant}/support"
    site.publish(name, f"{tenant} one")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="support").id
    with pytest.raises(openai.ConflictError, match=job):
        client.models.delete(name)
    with site.http(site.admin_key) as admin:
        refused = admin.delete(f"/v1/tenants/{tenant}")
    assert (refused.status_code, job in refused.json()["error"]["message"]) == (409, True)
    deleted = http.delete(f"/v1/adapters/{name}", params={"cancel_jobs": "true"}).json()
    assert (deleted["cancelled"], deleted["jobs"], deleted["versions"], deleted["files"]) == ([job], 1, 1, 0)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(job)
    assert client.files.delete(file).deleted
    for wrong in ({"cancel_jobs": "perhaps"}, {"force": "true"}):
        assert http.delete(f"/v1/adapters/{name}", params=wrong).status_code == 400


def test_only_an_admin_deletes_a_tenant(http: httpx.Client, site: Any, tenant: str, other: str) -> None:
    assert http.delete(f"/v1/tenants/{tenant}").status_code == 403
    site.publish(f"{tenant}/support", f"{tenant} one")
    with site.http(site.admin_key) as admin:
        deleted = admin.delete(f"/v1/tenants/{tenant}").json()
        assert (deleted["id"], deleted["object"], deleted["versions"]) == (tenant, "tenant", 1)
        again = admin.delete(f"/v1/tenants/{tenant}")
        assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
        assert admin.get(f"/v1/tenants/{tenant}").status_code == 404
        assert admin.get("/v1/audit", params={"tenant": tenant}).status_code == 404
        [row] = [row for row in admin.get("/v1/audit").json()["data"] if row["subject"] == tenant]
        assert (row["action"], row["tenant"], row["details"]) == (
            "tenant.delete",
            None,
            {"versions": 1, "jobs": 0, "files": 0},
        )
        assert admin.get(f"/v1/tenants/{other}").status_code == 200
        assert admin.post("/v1/tenants", json={"name": tenant}).status_code == 200
        assert admin.get(f"/v1/tenants/{tenant}/keys").json()["data"] == []


def test_only_a_key_for_adapters_deletes_them(site: Any, tenant: str) -> None:
    site.publish(f"{tenant}/support", f"{tenant} one")
    with site.registry.writing() as session:
        secrets = {scope: api_keys.create(session, tenant, scopes=[scope])[1] for scope in Scope}
    for scope in (Scope.INFERENCE, Scope.TRAINING, Scope.READ):
        with site.openai(secrets[scope]) as client, pytest.raises(openai.PermissionDeniedError, match="adapters"):
            client.models.delete(f"{tenant}/support")
    with site.openai(secrets[Scope.ADAPTERS]) as client:
        assert client.models.delete(f"{tenant}/support").deleted


def test_a_renamed_adapter_answers_only_by_its_new_name(
    client: OpenAI, http: httpx.Client, site: Any, twin: Any, tenant: str, other: str, jsonl: Any
) -> None:
    name, to = f"{tenant}/support", f"{tenant}/help"
    version = site.publish(name, f"{tenant} one")
    http.post(f"/v1/adapters/{name}/pin")
    file = client.files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="support").id
    with twin.openai(site.key(tenant)) as elsewhere:
        elsewhere.chat.completions.create(model=name, messages=HELLO)
        renamed = http.post(f"/v1/adapters/{name}/rename", json={"to": to}).json()
        assert (renamed["id"], renamed["champion"], renamed["pinned"]) == (to, version, True)
        refused_after(lambda: elsewhere.chat.completions.create(model=name, messages=HELLO), openai.NotFoundError)
        answer = elsewhere.chat.completions.with_raw_response.create(model=to, messages=HELLO)
    assert answer.headers["x-loramill-version"] == version
    assert http.get(f"/v1/fine_tuning/jobs/{job}").json()["loramill"]["adapter"] == to
    [change] = [row for row in http.get("/v1/audit").json()["data"] if row["action"] == "adapter.rename"]
    assert (change["subject"], change["details"]) == (name, {"to": to})
    site.publish(name, f"{tenant} two")
    for wrong, status, param in ((name, 409, "to"), (f"{other}/x", 400, "to"), ("x", 400, None), ("Bad/x", 400, None)):
        answer = http.post(f"/v1/adapters/{to}/rename", json={"to": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_a_tenant_shows_how_many_of_its_jobs_run_and_wait(site: Any, tenant: str, client: OpenAI, jsonl: Any) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune").id
    made = [client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="a").id for _ in range(3)]
    with site.registry.writing() as session:
        session.get_one(JobRow, made[0]).status = JobStatus.RUNNING
        jobs.pause(session, made[1])
        assert tenants.job_counts(session)[tenant] == (1, 2)
    with site.http(site.admin_key) as admin:
        [listed] = [row for row in admin.get("/v1/tenants").json()["data"] if row["name"] == tenant]
        assert (listed["running"], listed["waiting"]) == (1, 2)
        assert admin.get(f"/v1/tenants/{tenant}").json() == listed
        # The job that runs here has no worker; it must not be left to the other tests of this gateway.
        assert admin.delete(f"/v1/tenants/{tenant}", params={"cancel_jobs": "true"}).status_code == 200


def test_a_base_is_as_old_as_its_file(site: Any, client: OpenAI) -> None:
    written = int((site.base.folder / "config.json").stat().st_mtime)
    assert written > 1_500_000_000
    assert client.models.retrieve("tiny").created == written
    assert [model.created for model in client.models.list().data if model.id == "tiny"] == [written]


def test_many_tenants_are_made_in_one_transaction(site: Any, tenant: str) -> None:
    with site.http(site.admin_key) as admin:

        def make(*named: dict[str, Any], **options: Any) -> httpx.Response:
            return admin.post("/v1/tenants/batch", json={"tenants": list(named), **options})

        a, b = {"name": f"{tenant}-a", "weight": 3, "requests_per_minute": 5}, {"name": f"{tenant}-b"}
        for wrong, status, fragment in (
            ([a, {"name": "Bad Name"}], 400, "Bad Name"),
            ([a, {"name": tenant}], 409, tenant),
            ([a, b, a], 400, "listed twice"),
            ([a, {"name": f"{tenant}-c", "weight": 0}], 400, "weight"),
            ([], 400, "tenants"),
        ):
            refused = make(*wrong)
            assert (refused.status_code, fragment in refused.text) == (status, True), refused.text
            assert admin.get(f"/v1/tenants/{tenant}-a").status_code == 404
        first, second = make(a, b, keys=True).json()["data"]
        assert (first["new"], first["weight"], first["requests_per_minute"]) == (True, 3, 5)
        with site.http(second["key"]) as own:
            assert own.get("/v1/files").status_code == 200
        again = make(a, b | {"max_running": 2}, {"name": f"{tenant}-c"}, exist_ok=True, keys=True).json()["data"]
        assert [(row["new"], row["key"] is not None) for row in again] == [(False, False), (False, False), (True, True)]
        assert (again[0]["weight"], again[1]["max_running"]) == (3, 2)
    with site.http(site.key(tenant)) as own:
        assert own.post("/v1/tenants/batch", json={"tenants": [b]}).status_code == 403
