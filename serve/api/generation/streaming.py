"""Generation as the endpoints need it: several answers at once, the first chunk peeked, the caller watched."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from loramill.errors import LoramillError
from loramill.serve.api.errors import error_body, internal_error
from loramill.serve.protocol import GenerationBackend, SampledToken, TextChunk, TextRequest

log = logging.getLogger("loramill.gateway")

_T = TypeVar("_T")

#: Answers of one call that are generated at once: a call with many prompts isn't a flood.
_MAX_CONCURRENT_ANSWERS = 16

#: Chunks of several answers, each with its answer's index, in the order they become ready.
Chunks: TypeAlias = AsyncGenerator[tuple[int, TextChunk], None]


@dataclass(slots=True)
class GenerationResult:
    """One whole answer."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    logprobs: list[SampledToken] = field(default_factory=list)

    def add(self, chunk: TextChunk) -> None:
        """Takes the next chunk in."""
        self.text += chunk.text
        self.prompt_tokens, self.completion_tokens = chunk.prompt_tokens, chunk.completion_tokens
        self.finish = chunk.finish
        self.logprobs.extend(chunk.logprobs)


def generate(backend: GenerationBackend, requests: Sequence[TextRequest]) -> Chunks:
    """Generates all answers at the same time. Closing it cancels those that aren't finished.

    Raises:
        LoramillError: of the first answer that fails; the others are cancelled.
    """
    # A backend's iterator is a generator: closing it is what cancels the answer.
    streams = [backend.generate(request) for request in requests]
    return _interleaved(streams) if len(streams) > 1 else _single(streams[0])


async def _single(stream: AsyncGenerator[TextChunk, None]) -> Chunks:
    async with aclosing(stream):
        async for chunk in stream:
            yield 0, chunk


async def _interleaved(streams: Sequence[AsyncGenerator[TextChunk, None]]) -> Chunks:
    upcoming = iter(enumerate(streams))
    waiting = {_next(stream): index for index, stream in islice(upcoming, _MAX_CONCURRENT_ANSWERS)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                if (chunk := task.result()) is not None:
                    waiting[_next(streams[index])] = index
                    yield index, chunk
                else:
                    waiting |= {_next(stream): following for following, stream in islice(upcoming, 1)}
    finally:
        # Shielded: the caller who went away must not also interrupt the clearing up.
        with anyio.CancelScope(shield=True):
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()


def _next(stream: AsyncGenerator[TextChunk, None]) -> asyncio.Task[TextChunk | None]:
    async def following() -> TextChunk | None:
        return await anext(stream, None)

    return asyncio.create_task(following())


async def collect(chunks: Chunks, count: int) -> list[GenerationResult]:
    """The `count` answers, whole, by index."""
    answers = [GenerationResult() for _ in range(count)]
    async with aclosing(chunks):
        async for index, chunk in chunks:
            answers[index].add(chunk)
    return answers


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Returns what `work` returns; cancels it when the caller goes away.

    Raises:
        ClientDisconnect: the caller went away.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def respond_complete(
    request: Request,
    chunks: Chunks,
    count: int,
    render: Callable[[list[GenerationResult]], Any],
    headers: Mapping[str, str],
) -> JSONResponse:
    """All answers in one JSON object."""
    answers = await while_connected(request, collect(chunks, count))
    return JSONResponse(render(answers), headers=headers)


async def respond_streaming(
    request: Request, chunks: Chunks, render: Callable[[Chunks], AsyncGenerator[str, None]], headers: Mapping[str, str]
) -> StreamingResponse:
    """Answers as server-sent events, of which `show` makes the JSON.

    An error before the first event is raised, with a status of its own.
    """
    payloads = render(chunks)

    async def first() -> str:
        return await anext(payloads)

    peeked = await while_connected(request, first())
    return EventStreamResponse(_sse(peeked, payloads, request.state.request_id), chunks, headers)


class EventStreamResponse(StreamingResponse):
    """Server-sent events that close the generation under them, however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], chunks: Chunks, headers: Mapping[str, str]) -> None:
        super().__init__(lines, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        async with aclosing(self._chunks):
            await super().__call__(scope, receive, send)


async def _sse(first: str, rest: AsyncIterator[str], request_id: str) -> AsyncIterator[str]:
    try:
        yield _event(first)
        async for payload in rest:
            yield _event(payload)
        yield "data: [DONE]\n\n"
    except LoramillError as error:
        yield _event(json.dumps(error_body(error)))
    except Exception:
        log.exception("request %s failed in mid-stream", request_id, extra={"request": request_id})
        yield _event(json.dumps(error_body(internal_error(request_id))))


def _event(payload: str) -> str:
    return f"data: {payload}\n\n"
