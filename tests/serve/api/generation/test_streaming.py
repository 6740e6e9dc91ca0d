"""Streams: what they look like, and how they and their generation end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from loramill.errors import ContextLengthExceeded, LoramillError, Overloaded, Unavailable
from loramill.serve.api.generation.streaming import EventStreamResponse, generate
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend

from ....waiting import eventually

HELLO: Any = [{"role": "user", "content": "one two three"}]
LONG: Any = [{"role": "user", "content": "word " * 20_000}]


class Failing(EchoBackend):
    """Raises `error` after `after` chunks."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self._error, self._after = error, after

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        count = 0
        async with aclosing(cast("AsyncGenerator[TextChunk, None]", super().generate(request))) as chunks:
            async for chunk in chunks:
                if count == self._after:
                    raise self._error
                count += 1
                yield chunk


def test_chunks(client: OpenAI, site: Any) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].system_fingerprint == site.base.fingerprint[:12]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.content for delta in deltas[1:-1]] == ["one", " two", " three"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_usage_is_the_last_chunk(client: OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 6, 9)


def test_usage_on_every_chunk_as_vllm_gives_it(client: OpenAI) -> None:
    options: Any = {"stream": True, "n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for create in (
        lambda: client.chat.completions.create(model="tiny", messages=HELLO, **options),
        lambda: client.completions.create(model="tiny", prompt="one two three", **options),
    ):
        *chunks, last = create()
        counts: dict[int, list[int]] = {0: [], 1: []}
        for chunk in chunks:
            counts[chunk.choices[0].index].append(chunk.usage.completion_tokens)
            assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens
        for ones in counts.values():
            assert ones == sorted(ones) and set(ones) >= {1, 2, 3}
        assert last.choices == [] and last.usage.completion_tokens == 6
        assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens} == {3}


def test_usage_on_every_chunk_needs_include_usage(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        stream=True,
        stream_options={"continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_several_answers_in_one_stream(client: OpenAI) -> None:
    texts, roles, ends = ["", "", ""], [], []
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=3, logprobs=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        ends += [choice.index] if choice.finish_reason else []
        if choice.delta.content:
            assert choice.logprobs is not None and choice.logprobs.content is not None
            assert choice.logprobs.content[0].token == choice.delta.content
    assert texts == ["one two three"] * 3
    assert sorted(roles) == sorted(ends) == [0, 1, 2]


def test_bytes_on_the_wire(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"].startswith("req-")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_async_client(site: Any, tenant: str) -> None:
    async def complete() -> str:
        async with AsyncOpenAI(base_url=f"{site.url}/v1", api_key=site.key(tenant)) as client:
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(complete()) == "one two three"


def test_stream_helper_of_the_client(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == "one two three"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ContextLengthExceeded("too long", param="messages"), openai.BadRequestError, "context_length_exceeded"),
        (Overloaded("full"), openai.RateLimitError, "overloaded"),
        (Unavailable("gone"), openai.InternalServerError, "unavailable"),
        (RuntimeError("secret detail"), openai.InternalServerError, "internal_error"),
    ],
)
def test_error_before_the_first_chunk_has_its_status(
    client: OpenAI, site: Any, error: Exception, kind: type[openai.APIStatusError], code: str, stream: bool, n: int
) -> None:
    site.backend.now = backend = Failing(error)
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream, n=n)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)
    if isinstance(error, LoramillError):
        assert caught.value.status_code == error.status and error.message in caught.value.message
    if code in ("overloaded", "unavailable"):
        assert caught.value.response.headers["retry-after"] == "1"
    assert not backend.active


@pytest.mark.parametrize("error", [Unavailable("the engine was lost"), RuntimeError("secret detail")])
def test_error_in_mid_stream_is_an_event_and_the_end(
    client: OpenAI, http: httpx.Client, site: Any, error: Exception
) -> None:
    site.backend.now = backend = Failing(error, after=2)
    seen = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
            seen.append(chunk.choices[0].delta.content)
    assert seen == ["", "one", " two"]
    assert caught.value.code == ("unavailable" if isinstance(error, LoramillError) else "internal_error")
    assert "secret" not in str(caught.value)
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    events = http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert list(json.loads(events[-2].removeprefix("data: "))) == ["error"]
    assert not backend.active


def test_error_after_chunks_without_a_stream_has_its_status(client: OpenAI, site: Any) -> None:
    site.backend.now = Failing(Unavailable("the engine was lost"), after=2)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.status_code == 503


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_ends_the_generation(client: OpenAI, site: Any, n: int) -> None:
    site.backend.now = backend = EchoBackend(seconds_per_token=0.02)
    stream = client.chat.completions.create(model="tiny", messages=LONG, stream=True, n=n)
    next(iter(stream))
    assert len(backend.active) == n
    stream.close()
    eventually(lambda: not backend.active)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_before_any_output_ends_the_generation(site: Any, tenant: str, stream: bool, n: int) -> None:
    # Streaming, the first token never comes; otherwise they come, but the whole answer never does.
    site.backend.now = backend = EchoBackend(seconds_per_token=600 if stream else 0.02)
    body = json.dumps({"model": "tiny", "messages": LONG, "stream": stream, "n": n}).encode()
    address = httpx.URL(site.url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n" % (site.key(tenant).encode(), len(body)) + body
        )
        eventually(lambda: len(backend.active) == n)
    eventually(lambda: not backend.active)


def test_a_slow_stream_delays_no_other_request(client: OpenAI, site: Any) -> None:
    site.backend.now = EchoBackend(seconds_per_token=0.02)
    slow = client.chat.completions.create(model="tiny", messages=LONG, stream=True)
    next(iter(slow))
    site.backend.now = EchoBackend()
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content == "one two three"
    slow.close()


class Keeping(EchoBackend):
    """Keeps its iterators, so that only closing can end them, not garbage collection."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[AsyncIterator[TextChunk]] = []

    def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        self.kept.append(super().generate(request))
        return self.kept[-1]


def _requests(n: int) -> list[TextRequest]:
    return [TextRequest(id=str(index), tenant="t", prompt="a b c d") for index in range(n)]


@pytest.mark.parametrize("n", [1, 2, 8])
def test_closing_ends_answers_that_are_ready_but_unread(n: int) -> None:
    async def take_one() -> None:
        backend = Keeping()
        chunks = generate(backend, _requests(n), lambda *_: None)
        await anext(chunks)
        assert len(backend.active) == n
        await chunks.aclose()
        assert not backend.active

    asyncio.run(take_one())


def test_leaving_without_having_read_ends_the_generation() -> None:
    async def leave() -> None:
        backend, blocked = Keeping(), asyncio.Event()
        resources = AsyncExitStack()
        chunks = await resources.enter_async_context(aclosing(generate(backend, _requests(1), lambda *_: None)))

        async def lines() -> AsyncIterator[str]:
            async for _, chunk in chunks:
                yield chunk.text

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.Event().wait()

        async def receive() -> Any:
            await blocked.wait()
            return {"type": "http.disconnect"}

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        payloads = lines()
        response = EventStreamResponse(await anext(payloads), payloads, "req-1", {}, resources)
        await response(scope, receive, send)
        assert len(backend.requests) == 1 and not backend.active

    asyncio.run(leave())
