"""Limits of tenants, as a client meets them; and that gateways keep to them together."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.errors import ContextLengthExceeded, Unavailable
from loramill.registry import Registry, api_keys, tenants, usage
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend
from loramill.types import Limits, RateWindow

HELLO: Any = [{"role": "user", "content": "one two three"}]
_HEADERS = {f"x-ratelimit-{name}-{kind}" for name in ("limit", "remaining", "reset") for kind in ("requests", "tokens")}


@pytest.fixture(autouse=True)
def whole_minute() -> None:
    """Keeps the turn of a minute, when counts begin to fade, out of a test."""
    left = 60 - time.time() % 60
    if left < 10:
        time.sleep(left)


@pytest.fixture
def limit(site: Any, tenant: str) -> Callable[..., None]:
    def set_to(**limits: int) -> None:
        with site.registry.writing() as session:
            tenants.set_limits(session, tenant, Limits(**limits))

    return set_to


def ask(client: OpenAI, **changes: Any) -> httpx.Response:
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 2} | changes
    return client.chat.completions.with_raw_response.create(**given).http_response


class Held(EchoBackend):
    """Begins, and answers no more until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = False

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        yield TextChunk("first", 4, 1)
        while not self.go:
            await asyncio.sleep(0.005)
        yield TextChunk(" last", 4, 2, "stop")


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_a_minute(client: OpenAI, limit: Callable[..., None], echo: EchoBackend) -> None:
    limit(requests_per_minute=3)
    left = [ask(client).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    error, headers = caught.value, caught.value.response.headers
    assert (error.status_code, error.code, error.type, error.param) == (429, "rate_limit_exceeded", "requests", None)
    assert "3 requests per minute" in error.message
    seconds, milliseconds = int(headers["retry-after"]), int(headers["retry-after-ms"])
    assert 0 < milliseconds <= 120_000 and 1000 * (seconds - 1) < milliseconds <= 1000 * seconds
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "0")
    assert len(echo.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_generation_tells_what_is_left(
    http: httpx.Client, limit: Callable[..., None], path: str, stream: bool
) -> None:
    body = {"model": "tiny", "stream": stream, "max_tokens": 2}
    what: dict[str, Any] = {"messages": HELLO} if "chat" in path else {"prompt": "one two"}
    assert not _HEADERS & set(http.post(path, json=body | what).headers)
    limit(requests_per_minute=100, tokens_per_minute=1000)
    headers = http.post(path, json=body | what).headers
    assert set(headers) >= _HEADERS
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert re.fullmatch(r"(\d+m)?[\d.]+m?s", headers["x-ratelimit-reset-tokens"])


def test_tokens_are_reserved_and_then_counted(client: OpenAI, limit: Callable[..., None]) -> None:
    limit(tokens_per_minute=100)
    # A prompt of 3 tokens (taken for 4 by its characters) and an answer of 2, of which 60 were reserved.
    assert ask(client, max_tokens=60).headers["x-ratelimit-remaining-tokens"] == str(100 - 4 - 60)
    assert ask(client, max_tokens=60).headers["x-ratelimit-remaining-tokens"] == str(100 - 6 - 4 - 60)
    assert ask(client, max_tokens=80).headers["x-ratelimit-remaining-tokens"] == str(100 - 12 - 4 - 80)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, max_tokens=90)
    assert (caught.value.type, caught.value.code) == ("tokens", "rate_limit_exceeded")
    assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == "82"
    assert ask(client, max_tokens=70).status_code == 200  # what was refused took nothing


def test_a_request_of_more_than_the_limit_passes_alone(client: OpenAI, limit: Callable[..., None]) -> None:
    limit(tokens_per_minute=20)
    assert ask(client, max_tokens=500).status_code == 200
    with pytest.raises(openai.RateLimitError):
        ask(client, max_tokens=500)
    assert ask(client, max_tokens=5).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_once_and_their_end(
    site: Any, http: httpx.Client, limit: Callable[..., None], stream: bool
) -> None:
    limit(concurrent_requests=1)
    site.backend.now = held = Held()
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    for leaving in (False, True):
        with http.stream("POST", "/v1/chat/completions", json=body) as first:
            assert first.status_code == 200
            refused = http.post("/v1/chat/completions", json=body | {"stream": stream})
            assert refused.status_code == 429 and refused.json()["error"]["type"] == "requests"
            assert refused.headers["retry-after"] == "1"
            held.go = not leaving
            if not leaving:
                first.read()
        held.go = True
        # Whoever leaves is noticed in a moment.
        wait_for(lambda: http.post("/v1/chat/completions", json=body).status_code == 200)
        held.go = False


class Failing(EchoBackend):
    """Refuses before it begins."""

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        raise ContextLengthExceeded("too long")
        yield


def test_what_fails_gives_back_what_it_took(site: Any, http: httpx.Client, limit: Callable[..., None]) -> None:
    limit(concurrent_requests=1, tokens_per_minute=100)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 90}
    site.backend.now = Failing()
    for stream in (False, True, False, True):
        assert http.post("/v1/chat/completions", json=body | {"stream": stream}).status_code == 400
    site.backend.now = EchoBackend()
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_tenants_and_admins_do_not_share(
    site: Any, client: OpenAI, limit: Callable[..., None], tenant: str, other: str
) -> None:
    limit(requests_per_minute=1)
    ask(client)
    with pytest.raises(openai.RateLimitError):
        ask(client)
    for _ in range(2):
        ask(site.openai(site.key(other)))
        ask(site.openai(site.admin_key))
        answer = ask(site.openai(site.admin_key, organization=tenant))  # as the night does
        assert not _HEADERS & set(answer.headers)
    with site.openai(site.key(tenant)) as second, pytest.raises(openai.RateLimitError):
        ask(second)  # another key of the same tenant


def test_limits_are_set_in_parts(site: Any, tenant: str, http: httpx.Client) -> None:
    names = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "stored_bytes")
    with site.http(site.admin_key) as admin:

        def set_to(**said: Any) -> tuple[Any, ...]:
            answer = admin.post(f"/v1/tenants/{tenant}/limits", json=said)
            assert answer.status_code == 200, answer.text
            assert admin.get(f"/v1/tenants/{tenant}").json() == answer.json()
            return tuple(answer.json()[name] for name in names)

        assert set_to() == (None, None, None, None)
        assert set_to(requests_per_minute=5, stored_bytes=0) == (5, None, None, 0)
        assert set_to(tokens_per_minute=2**40, stored_bytes="unlimited") == (5, 2**40, None, None)
        for said in (
            {"requests_per_minute": 0},
            {"requests_per_minute": 2**31},
            {"tokens_per_minute": 1.5},
            {"concurrent_requests": "many"},
            {"stored_bytes": -1},
            {"wibble": 1},
        ):
            refused = admin.post(f"/v1/tenants/{tenant}/limits", json=said)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(said)))
        assert admin.post("/v1/tenants/nobody/limits", json={}).status_code == 404
    assert http.post(f"/v1/tenants/{tenant}/limits", json={}).status_code == 403


def test_stored_bytes(client: OpenAI, http: httpx.Client, limit: Callable[..., None], jsonl: Any) -> None:
    content = jsonl(5)
    limit(stored_bytes=len(content))
    made = client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    with pytest.raises(openai.RateLimitError) as caught:
        client.with_options(max_retries=5).files.create(file=("b.jsonl", jsonl(4)), purpose="fine-tune")
    assert (caught.value.code, caught.value.response.headers["x-should-retry"]) == ("quota_exceeded", "false")
    assert int(caught.value.response.headers["retry-after"]) > 0
    again = http.post("/v1/files", data={"purpose": "fine-tune", "reuse": "true"}, files={"file": ("a", content)})
    assert again.status_code == 429  # nothing tells that it is there before there is room for it
    client.files.delete(made.id)
    client.files.create(file=("b.jsonl", jsonl(4)), purpose="fine-tune")


# -- several gateways --------------------------------------------------------------------------------------------------


def test_gateways_share_a_tenants_minute(site: Any, twin: Any, tenant: str, limit: Callable[..., None]) -> None:
    limit(requests_per_minute=4)
    secret = site.key(tenant)
    with site.openai(secret) as here, twin.openai(secret) as there:
        assert [ask(here).status_code for _ in range(4)] == [200] * 4
        time.sleep(1.2)  # two turns of the books
        with pytest.raises(openai.RateLimitError):
            ask(there)


def test_what_ran_on_a_killed_gateway_runs_no_more(site: Any, tenant: str, limit: Callable[..., None]) -> None:
    limit(concurrent_requests=1)

    def write(ago: float) -> None:
        now = time.time()
        with site.registry.writing() as session:
            meters = {tenant: RateWindow(int(now // 60), requests=1, running_requests=1)}
            usage.record_batch(session, f"killed-{tenant}", 1, {}, meters, now=now - ago)
        time.sleep(0.7)

    with site.openai(site.key(tenant)) as client:
        write(ago=0.0)
        with pytest.raises(openai.RateLimitError):
            ask(client)
        write(ago=usage.SILENT_SECONDS)
        assert ask(client).status_code == 200


@pytest.mark.parametrize("change", ["revoke", "promote", "limits"])
def test_a_change_by_one_gateway_is_seen_by_another_within_a_second(
    site: Any, twin: Any, tenant: str, change: str
) -> None:
    first, second = site.publish(f"{tenant}/a", f"{tenant} one"), site.publish(f"{tenant}/a", f"{tenant} two")
    with site.registry.writing() as session:
        key, secret = api_keys.create(session, tenant)
    with site.http(site.admin_key) as admin, twin.http(secret) as there:

        def seen() -> bool:
            if change == "limits":
                answer = there.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
                return "x-ratelimit-limit-requests" in answer.raise_for_status().headers
            # A generation would be written down, and whoever writes reads anew.
            answer = there.get(f"/v1/models/{tenant}/a")
            if change == "revoke":
                return answer.status_code == 401
            assert answer.json()["version"] in (first, second)
            return answer.json()["version"] == second

        assert not seen()
        if change == "revoke":
            admin.delete(f"/v1/keys/{key.id}").raise_for_status()
        elif change == "promote":
            admin.post(f"/v1/adapters/{tenant}/a/promote", json={"version": second}).raise_for_status()
        else:
            admin.post(f"/v1/tenants/{tenant}/limits", json={"requests_per_minute": 1000}).raise_for_status()
        time.sleep(1.0)
        assert seen()


def test_without_the_database_only_names_that_were_read_before_are_answered(
    site: Any, client: OpenAI, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Registry) -> Any:
        raise Unavailable("The connection to the database was lost.")

    ask(client)
    monkeypatch.setattr(Registry, "reading", away)
    time.sleep(0.6)  # for so long, what was read holds anyhow
    assert ask(client).status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, model=f"{tenant}/never-asked")
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    assert caught.value.response.headers["retry-after"] == "1"
    monkeypatch.undo()
    assert ask(client).status_code == 200
