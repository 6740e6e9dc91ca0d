"""Limits of tenants, as a client sees them and across gateways."""

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

from ....waiting import eventually

HELLO: Any = [{"role": "user", "content": "one two three"}]
_HEADERS = {f"x-ratelimit-{name}-{kind}" for name in ("limit", "remaining", "reset") for kind in ("requests", "tokens")}


@pytest.fixture(autouse=True)
def whole_minute() -> None:
    """Waits so that no minute, after which counts begin to fade, ends within a test."""
    left = 60 - time.time() % 60
    if left < 10:
        time.sleep(left)


@pytest.fixture
def limit(site: Any, tenant: str) -> Callable[..., None]:
    def set_to(**limits: int) -> None:
        with site.registry.writing() as session:
            tenants.set_limits(session, tenant, Limits(**limits))

    return set_to


def chat(client: OpenAI, **changes: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2} | changes
    return client.chat.completions.with_raw_response.create(**body).http_response


class Held(EchoBackend):
    """Sends its first chunk, and its last only once `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = False

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        yield TextChunk("first", 4, 1)
        while not self.go:
            await asyncio.sleep(0.005)
        yield TextChunk(" last", 4, 2, "stop")


def test_requests_per_minute(client: OpenAI, limit: Callable[..., None], echo: EchoBackend) -> None:
    limit(requests_per_minute=3)
    left = [chat(client).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    with pytest.raises(openai.RateLimitError) as caught:
        chat(client)
    error, headers = caught.value, caught.value.response.headers
    assert (error.status_code, error.code, error.type, error.param) == (429, "rate_limit_exceeded", "requests", None)
    assert "3 requests per minute" in error.message
    seconds, milliseconds = int(headers["retry-after"]), int(headers["retry-after-ms"])
    assert 0 < milliseconds <= 120_000 and 1000 * (seconds - 1) < milliseconds <= 1000 * seconds
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "0")
    assert len(echo.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_generation_reports_what_is_left(
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
    assert chat(client, max_tokens=60).headers["x-ratelimit-remaining-tokens"] == str(100 - 4 - 60)
    assert chat(client, max_tokens=60).headers["x-ratelimit-remaining-tokens"] == str(100 - 6 - 4 - 60)
    assert chat(client, max_tokens=80).headers["x-ratelimit-remaining-tokens"] == str(100 - 12 - 4 - 80)
    with pytest.raises(openai.RateLimitError) as caught:
        chat(client, max_tokens=90)
    assert (caught.value.type, caught.value.code) == ("tokens", "rate_limit_exceeded")
    assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == "82"
    assert chat(client, max_tokens=70).status_code == 200  # the refused request used nothing


def test_a_request_larger_than_the_limit_passes_alone(client: OpenAI, limit: Callable[..., None]) -> None:
    limit(tokens_per_minute=20)
    assert chat(client, max_tokens=500).status_code == 200
    with pytest.raises(openai.RateLimitError):
        chat(client, max_tokens=500)
    assert chat(client, max_tokens=5).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_concurrent_requests_count_until_they_end(
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
        # A disconnection takes a moment to be noticed.
        eventually(lambda: http.post("/v1/chat/completions", json=body).status_code == 200)
        held.go = False


class Failing(EchoBackend):
    """Refuses every request before its first chunk."""

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        raise ContextLengthExceeded("too long")
        yield


def test_a_failed_request_returns_what_it_reserved(site: Any, http: httpx.Client, limit: Callable[..., None]) -> None:
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
    chat(client)
    with pytest.raises(openai.RateLimitError):
        chat(client)
    for _ in range(2):
        chat(site.openai(site.key(other)))
        chat(site.openai(site.admin_key))
        answer = chat(site.openai(site.admin_key, organization=tenant))  # as the nightly run does
        assert not _HEADERS & set(answer.headers)
    with site.openai(site.key(tenant)) as second, pytest.raises(openai.RateLimitError):
        chat(second)  # another key of the same tenant


def test_limits_are_set_one_by_one(site: Any, tenant: str, http: httpx.Client) -> None:
    names = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "stored_bytes")
    with site.http(site.admin_key) as admin:

        def set_to(**changes: Any) -> tuple[Any, ...]:
            answer = admin.post(f"/v1/tenants/{tenant}/limits", json=changes)
            assert answer.status_code == 200, answer.text
            assert admin.get(f"/v1/tenants/{tenant}").json() == answer.json()
            return tuple(answer.json()[name] for name in names)

        assert set_to() == (None, None, None, None)
        assert set_to(requests_per_minute=5, stored_bytes=0) == (5, None, None, 0)
        assert set_to(tokens_per_minute=2**40, stored_bytes="unlimited") == (5, 2**40, None, None)
        for changes in (
            {"requests_per_minute": 0},
            {"requests_per_minute": 2**31},
            {"tokens_per_minute": 1.5},
            {"concurrent_requests": "many"},
            {"stored_bytes": -1},
            {"wibble": 1},
        ):
            refused = admin.post(f"/v1/tenants/{tenant}/limits", json=changes)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(changes)))
        assert admin.post("/v1/tenants/unknown/limits", json={}).status_code == 404
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
    assert again.status_code == 429  # without quota, nothing reveals that the file exists already
    client.files.delete(made.id)
    client.files.create(file=("b.jsonl", jsonl(4)), purpose="fine-tune")


# -- several gateways --------------------------------------------------------------------------------------------------


def test_gateways_share_a_tenants_minute(
    site: Any, twin: Any, tenant: str, limit: Callable[..., None], flushed: Callable[..., None]
) -> None:
    limit(requests_per_minute=4)
    secret = site.key(tenant)
    with site.openai(secret) as first, twin.openai(secret) as second:
        assert [chat(first).status_code for _ in range(4)] == [200] * 4
        flushed(site)
        flushed(twin)
        with pytest.raises(openai.RateLimitError):
            chat(second)


def test_requests_of_a_killed_gateway_stop_counting(
    site: Any, tenant: str, limit: Callable[..., None], flushed: Callable[..., None]
) -> None:
    limit(concurrent_requests=1)

    def write(ago: float) -> None:
        now = time.time()
        with site.registry.writing() as session:
            windows = {tenant: RateWindow(int(now // 60), requests=1, running_requests=1)}
            usage.record_batch(session, f"killed-{tenant}", 1, {}, windows, now=now - ago)
        flushed(site)

    with site.openai(site.key(tenant)) as client:
        write(ago=0.0)
        with pytest.raises(openai.RateLimitError):
            chat(client)
        write(ago=usage.SILENT_SECONDS)
        assert chat(client).status_code == 200


@pytest.mark.parametrize("change", ["revoke", "promote", "limits"])
def test_a_change_by_one_gateway_is_seen_by_another_within_a_second(
    site: Any, twin: Any, tenant: str, change: str
) -> None:
    first, second = site.publish(f"{tenant}/a", f"{tenant} one"), site.publish(f"{tenant}/a", f"{tenant} two")
    with site.registry.writing() as session:
        key, secret = api_keys.create(session, tenant)
    with site.http(site.admin_key) as admin, twin.http(secret) as other_gateway:

        def seen() -> bool:
            if change == "limits":
                answer = other_gateway.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
                return "x-ratelimit-limit-requests" in answer.raise_for_status().headers
            # Not a generation, whose usage would be written: a write makes a gateway read again.
            answer = other_gateway.get(f"/v1/models/{tenant}/a")
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


def test_without_the_database_only_cached_names_are_served(
    site: Any, client: OpenAI, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Registry) -> Any:
        raise Unavailable("The connection to the database was lost.")

    chat(client)
    monkeypatch.setattr(Registry, "reading", away)
    time.sleep(0.6)  # until then, what was read is valid anyhow
    assert chat(client).status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, model=f"{tenant}/never-read")
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    assert caught.value.response.headers["retry-after"] == "1"
    monkeypatch.undo()
    assert chat(client).status_code == 200
