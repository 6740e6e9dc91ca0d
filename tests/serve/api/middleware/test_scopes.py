"""Scopes and expiry of keys."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest

from loramill.registry import api_keys
from loramill.serve.api.middleware.authentication import OPEN_PATHS, accepted_scopes
from loramill.types import Scope

HELLO: Any = [{"role": "user", "content": "hi"}]
INFER, TRAIN, MANAGE, READ = Scope.INFERENCE, Scope.TRAINING, Scope.ADAPTERS, Scope.READ

#: Every endpoint that needs a key, and the scopes that each takes.
TABLE: dict[str, tuple[Scope, ...]] = {
    "POST /v1/chat/completions": (INFER,),
    "POST /v1/completions": (INFER,),
    "GET /v1/chat/completions": (INFER, READ),
    "GET /v1/chat/completions/*": (INFER, READ),
    "GET /v1/chat/completions/*/messages": (INFER, READ),
    "POST /v1/chat/completions/*": (INFER,),
    "DELETE /v1/chat/completions/*": (INFER,),
    "GET /v1/completions": (INFER, READ),
    "GET /v1/completions/*": (INFER, READ),
    "DELETE /v1/completions/*": (INFER,),
    "POST /v1/feedback": (INFER,),
    "GET /v1/feedback": (INFER, READ),
    "DELETE /v1/feedback": (INFER,),
    "DELETE /v1/feedback/*": (INFER,),
    "GET /v1/models": (INFER, READ),
    "GET /v1/models/*": (INFER, READ),
    "DELETE /v1/models/*": (MANAGE,),
    "POST /v1/files": (TRAIN,),
    "POST /v1/files/check": (TRAIN,),
    "GET /v1/files": (TRAIN, READ),
    "GET /v1/files/*": (TRAIN, READ),
    "GET /v1/files/*/content": (TRAIN, READ),
    "DELETE /v1/files/*": (TRAIN,),
    "POST /v1/fine_tuning/jobs": (TRAIN,),
    "POST /v1/fine_tuning/jobs/batch": (TRAIN,),
    "GET /v1/fine_tuning/jobs": (TRAIN, READ),
    "GET /v1/fine_tuning/jobs/*": (TRAIN, READ),
    "POST /v1/fine_tuning/jobs/*/cancel": (TRAIN,),
    "POST /v1/fine_tuning/jobs/*/pause": (TRAIN,),
    "POST /v1/fine_tuning/jobs/*/resume": (TRAIN,),
    "POST /v1/fine_tuning/jobs/*/retry": (TRAIN,),
    "GET /v1/fine_tuning/jobs/*/events": (TRAIN, READ),
    "GET /v1/fine_tuning/jobs/*/checkpoints": (TRAIN, READ),
    "GET /v1/adapters": (MANAGE, READ),
    "GET /v1/adapters/*/*": (MANAGE, READ),
    "GET /v1/adapters/*/*/files": (MANAGE, READ),
    "GET /v1/adapters/*/*/files/*": (MANAGE, READ),
    "DELETE /v1/adapters/*/*": (MANAGE,),
    "DELETE /v1/adapters/*/*/versions/*": (MANAGE,),
    "POST /v1/adapters/*/*/rename": (MANAGE,),
    "POST /v1/adapters/*/*/import": (MANAGE,),
    "POST /v1/adapters/*/*/promote": (MANAGE,),
    "POST /v1/adapters/*/*/rollback": (MANAGE,),
    "POST /v1/adapters/*/*/pin": (MANAGE,),
    "POST /v1/adapters/*/*/unpin": (MANAGE,),
    "POST /v1/adapters/*/*/warm": (MANAGE,),
    "POST /v1/adapters/*/*/canary": (MANAGE,),
    "DELETE /v1/adapters/*/*/canary": (MANAGE,),
    "GET /v1/adapters/approvals": (MANAGE, READ),
    "POST /v1/adapters/*/*/approval": (MANAGE,),
    "POST /v1/adapters/*/*/retention": (MANAGE,),
    "POST /v1/adapters/prune": (MANAGE,),
    "GET /v1/adapters/*/*/data": (TRAIN, READ),
    "POST /v1/adapters/*/*/data": (TRAIN,),
    "POST /v1/tenants": (READ,),
    "POST /v1/tenants/batch": (READ,),
    "GET /v1/tenants": (READ,),
    "GET /v1/tenants/*": (READ,),
    "DELETE /v1/tenants/*": (READ,),
    "POST /v1/tenants/*/share": (READ,),
    "POST /v1/tenants/*/limits": (READ,),
    "POST /v1/tenants/*/storage": (READ,),
    "POST /v1/tenants/*/keys": (READ,),
    "GET /v1/tenants/*/keys": (READ,),
    "DELETE /v1/keys/*": (READ,),
    "GET /v1/usage": (READ,),
    "GET /v1/audit": (READ,),
    "GET /metrics": (READ,),
}


def test_every_endpoint_is_in_the_table(site: Any, endpoints: list[tuple[str, str]]) -> None:
    served = {f"{method} {path}" for method, path in endpoints if path not in OPEN_PATHS}
    assert served == set(TABLE)


@pytest.mark.parametrize(("endpoint", "scopes"), TABLE.items())
def test_the_scopes_of_an_endpoint(endpoint: str, scopes: tuple[Scope, ...]) -> None:
    method, _, path = endpoint.partition(" ")
    assert accepted_scopes(method, path.replace("*", "x")) == scopes


def test_a_key_allows_only_its_scope_and_errors_name_the_other(site: Any, tenant: str, jsonl: Any) -> None:
    with site.registry.writing() as session:
        secrets = {scope: api_keys.create(session, tenant, scopes=[scope])[1] for scope in Scope}
    site.publish(f"{tenant}/a", f"{tenant} one")

    def call_each(http: httpx.Client) -> dict[Scope, httpx.Response]:
        upload = {"file": ("a.jsonl", jsonl(5))}
        return {
            INFER: http.post("/v1/chat/completions", json={"model": f"{tenant}/a", "messages": HELLO}),
            TRAIN: http.post("/v1/files", data={"purpose": "fine-tune"}, files=upload),
            MANAGE: http.post(f"/v1/adapters/{tenant}/a/promote", json={"version": "champion"}),
            READ: http.get("/v1/usage"),
        }

    for scope, secret in secrets.items():
        with site.http(secret) as http:
            for needed, answer in call_each(http).items():
                if needed is scope:
                    assert answer.status_code == 200, answer.text
                else:
                    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
                    assert f"'{needed}'" in answer.json()["error"]["message"]
    with site.http(site.key(tenant)) as http:
        assert {answer.status_code for answer in call_each(http).values()} == {200}
    with site.http(secrets[INFER]) as http:
        assert http.get("/v1/models").status_code == 200
    with site.openai(secrets[READ]) as client, pytest.raises(openai.PermissionDeniedError, match="inference"):
        client.chat.completions.create(model=f"{tenant}/a", messages=HELLO)


def test_keys_are_made_with_scopes_and_an_expiry(site: Any, tenant: str) -> None:
    ends = time.time() + 3600
    with site.http(site.admin_key) as http:
        path = f"/v1/tenants/{tenant}/keys"
        made = http.post(path, json={"scopes": ["read", "inference"], "expires_at": ends}).json()
        assert (made["scopes"], made["expires_at"]) == (["inference", "read"], ends)
        every = http.post(path).json()
        assert (every["scopes"], every["expires_at"]) == (list(Scope), None)
        assert [row["scopes"] for row in http.get(path).json()["data"]] == [made["scopes"], every["scopes"]]
        for body, param in (
            ({"scopes": []}, "scopes"),
            ({"scopes": ["root"]}, "scopes[0]"),
            ({"expires_at": 1.0}, "expires_at"),
            ({"expires_at": "tomorrow"}, "expires_at"),
            ({"wibble": 1}, "wibble"),
        ):
            refused = http.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


def test_an_expired_key_is_refused_although_it_is_cached(
    site: Any, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.registry.writing() as session:
        _, secret = api_keys.create(session, tenant, expires_at=time.time() + 60)
    with site.http(secret) as http:
        assert http.get("/v1/models").status_code == 200
        later = time.time() + 61  # the cache entry is still valid
        monkeypatch.setattr(time, "time", lambda: later)
        answer = http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
