"""Keys, tenants, and what each may do."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.registry import api_keys
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.replica.fake import EchoBackend

HELLO: Any = [{"role": "user", "content": "hi"}]


def test_unknown_key(site: Any, echo: EchoBackend) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        site.openai("lm-wrong").chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.code, caught.value.status_code) == ("invalid_api_key", 401)
    assert not echo.requests


def test_a_url_may_contain_the_key(site: Any, tenant: str) -> None:
    with site.http() as http:
        assert http.get("/v1/models", auth=("key", site.key(tenant))).status_code == 200
        assert http.get("/v1/models", auth=("key", "lm-wrong")).status_code == 401


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Basic abc", "Basic /w==", "Basic YWJj", "lm-abc", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/nothing", "/nothing"])
def test_no_key(site: Any, authorization: str | None, path: str) -> None:
    headers = {} if authorization is None else {b"authorization": authorization.encode("latin-1")}
    with site.http() as http:
        response = http.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"].startswith("req-")
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)


def test_a_body_is_not_read_without_a_key(site: Any) -> None:
    with site.http() as http:
        assert http.post("/v1/chat/completions", content=b"{").status_code == 401


def test_revoked_at_once(site: Any, tenant: str) -> None:
    with site.registry.writing() as session:
        record, secret = api_keys.create(session, tenant)
    client = site.openai(secret)
    client.models.list()
    with site.registry.writing() as session:
        api_keys.revoke(session, record.id)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def _call(client: OpenAI, http: httpx.Client, how: str, name: str) -> httpx.Response:
    body = {"model": name, "messages": HELLO, "prompt": "hi"}
    match how:
        case "chat":
            return http.post("/v1/chat/completions", json={"model": name, "messages": HELLO})
        case "stream":
            return http.post("/v1/chat/completions", json={"model": name, "messages": HELLO, "stream": True})
        case "completion":
            return http.post("/v1/completions", json={"model": name, "prompt": "hi"})
        case "model":
            return http.get(f"/v1/models/{name}")
        case "adapter":
            return http.get(f"/v1/adapters/{name}")
        case "promote":
            return http.post(f"/v1/adapters/{name}/promote", json={"version": "champion"})
        case "rollback":
            return http.post(f"/v1/adapters/{name}/rollback")
        case "data":
            return http.post(f"/v1/adapters/{name}/data", json={"training_file": "file-x"})
    raise AssertionError(body)


@pytest.mark.parametrize("how", ["chat", "stream", "completion", "model", "adapter", "promote", "rollback", "data"])
def test_foreign_adapters_are_forbidden_whether_or_not_they_exist(
    client: OpenAI, http: httpx.Client, site: Any, other: str, how: str
) -> None:
    answers = [_call(client, http, how, f"{other}/secret")]
    site.publish(f"{other}/secret", f"{other} v1")
    answers.append(_call(client, http, how, f"{other}/secret"))
    answers.append(_call(client, http, how, "unknown/nothing"))
    assert [answer.status_code for answer in answers] == [403, 403, 403]
    assert answers[0].json()["error"]["code"] == "forbidden"
    assert len({answer.content for answer in answers}) == 1

    def comparable(answer: httpx.Response) -> dict[str, str]:
        return {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}

    assert comparable(answers[0]) == comparable(answers[1]) == comparable(answers[2])


def test_permission_denied_in_the_client(client: OpenAI, other: str) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(model=f"{other}/secret@champion", messages=HELLO)
    assert caught.value.code == "forbidden"


def test_a_tenant_acts_for_itself_only(site: Any, tenant: str, other: str) -> None:
    secret = site.key(tenant)
    assert site.openai(secret, organization=tenant).models.list().data
    for organization in (other, "unknown"):
        with pytest.raises(openai.PermissionDeniedError):
            site.openai(secret, organization=organization).models.list()


def test_an_admin_acts_for_any_tenant(site: Any, admin: OpenAI, tenant: str, other: str, echo: EchoBackend) -> None:
    site.publish(f"{other}/secret", f"{other} v1")
    admin.chat.completions.create(model=f"{other}/secret", messages=HELLO)
    acting = site.openai(site.admin_key, organization=tenant)
    acting.chat.completions.create(model="tiny", messages=HELLO)
    assert [request.tenant for request in echo.requests] == [other, tenant]
    assert f"{other}/secret" not in {model.id for model in acting.models.list()}
    with pytest.raises(openai.NotFoundError):
        site.openai(site.admin_key, organization="unknown").models.list()


def test_an_admin_without_a_tenant_cannot_create_files(admin: OpenAI, jsonl: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="OpenAI-Organization"):
        admin.files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune")


def test_tenants_and_keys(site: Any) -> None:
    with site.http(site.admin_key) as http:
        made = http.post("/v1/tenants", json={"name": "made-by-test"}).json()
        assert (made["name"], made["object"]) == ("made-by-test", "tenant")
        assert "made-by-test" in [row["name"] for row in http.get("/v1/tenants", params={"limit": 100}).json()["data"]]
        again = http.post("/v1/tenants", json={"name": "made-by-test"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
        assert http.post("/v1/tenants", json={"name": "No Good"}).status_code == 400
        key = http.post("/v1/tenants/made-by-test/keys").json()
        assert key["key"].startswith("lm-") and key["key"].endswith(key["hint"]) and key["tenant"] == "made-by-test"
        assert http.post("/v1/tenants/unknown/keys").status_code == 404
        client = site.openai(key["key"])
        client.models.list()
        listed = http.get("/v1/tenants/made-by-test/keys").json()
        assert [row["id"] for row in listed["data"]] == [key["id"]] and key["key"] not in str(listed)
        assert http.delete(f"/v1/keys/{key['id']}").json()["revoked_at"] is not None
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert http.delete("/v1/keys/key-none").status_code == 404


def test_a_tenant_is_not_an_admin(http: httpx.Client, tenant: str, other: str) -> None:
    refused = [
        http.post("/v1/tenants", json={"name": "mine"}),
        http.get("/v1/tenants"),
        http.post(f"/v1/tenants/{tenant}/keys"),
        http.get(f"/v1/tenants/{other}/keys"),
        http.get("/v1/tenants/unknown/keys"),
        http.delete("/v1/keys/key-x"),
    ]
    assert {response.status_code for response in refused} == {403}
    assert len(http.get(f"/v1/tenants/{tenant}/keys").json()["data"]) == 1


def test_caller_decides_by_value() -> None:
    tenant, admin, acting = Caller("k", False, "a"), Caller("k", True, None), Caller("k", True, "a")
    assert (tenant.require_tenant(), acting.require_tenant()) == ("a", "a")
    tenant.check_adapter("a")
    admin.check_adapter("b")
    acting.check_adapter("b")
    acting.check_admin()
