"""Responses of generations: complete or as server-sent events, from several answers that are generated at once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
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

#: Answers of one call that are generated at once, so that a call with many prompts does not flood the engine.
_MAX_CONCURRENT_ANSWERS = 16

#: Chunks of several answers, each with the index of its answer, in the order in which they become ready.
Chunks: TypeAlias = AsyncGenerator[tuple[int, TextChunk], None]


@dataclass(slots=True)
class GenerationResult:
    """One complete answer."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    logprobs: list[SampledToken] = field(default_factory=list)

    def add(self, chunk: TextChunk) -> None:
        """Appends the next chunk."""
        self.text += chunk.text
        self.prompt_tokens, self.completion_tokens = chunk.prompt_tokens, chunk.completion_tokens
        self.finish = chunk.finish
        self.logprobs.extend(chunk.logprobs)


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted call.

    Attributes:
        chunks: the chunks of all its answers.
        headers: headers of the response.
    """

    chunks: Chunks
    headers: Mapping[str, str]


def generate(
    backend: GenerationBackend, requests: Sequence[TextRequest], on_chunk: Callable[[int, TextChunk], None]
) -> Chunks:
    """Generates all answers at the same time. Closing the generator cancels those that are not finished.

    Args:
        backend: generates the answers.
        requests: one request per answer.
        on_chunk: called with each chunk and the index of its answer.

    Raises:
        LoramillError: the error of the first answer that fails; the others are cancelled.
    """
    # A backend's iterator is a generator, and closing it cancels its answer.
    streams = [backend.generate(request) for request in requests]
    return _interleaved(streams, on_chunk) if len(streams) > 1 else _single(streams[0], on_chunk)


async def _single(stream: AsyncGenerator[TextChunk, None], on_chunk: Callable[[int, TextChunk], None]) -> Chunks:
    async with aclosing(stream):
        async for chunk in stream:
            on_chunk(0, chunk)
            yield 0, chunk


async def _interleaved(
    streams: Sequence[AsyncGenerator[TextChunk, None]], on_chunk: Callable[[int, TextChunk], None]
) -> Chunks:
    upcoming = iter(enumerate(streams))
    pending = {_next(stream): index for index, stream in islice(upcoming, _MAX_CONCURRENT_ANSWERS)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                if (chunk := task.result()) is not None:
                    pending[_next(streams[index])] = index
                    on_chunk(index, chunk)
                    yield index, chunk
                else:
                    pending |= {_next(stream): following for following, stream in islice(upcoming, 1)}
    finally:
        # Shielded, since a client that disconnects must not interrupt the clean-up too.
        with anyio.CancelScope(shield=True):
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            for stream in streams:
                await stream.aclose()


def _next(stream: AsyncGenerator[TextChunk, None]) -> asyncio.Task[TextChunk | None]:
    async def next_chunk() -> TextChunk | None:
        return await anext(stream, None)

    return asyncio.create_task(next_chunk())


async def collect(chunks: Chunks, count: int) -> list[GenerationResult]:
    """Returns the `count` complete answers, by index."""
    results = [GenerationResult() for _ in range(count)]
    async for index, chunk in chunks:
        results[index].add(chunk)
    return results


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Returns the result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    task, disconnected = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(task, disconnected, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def respond_complete(
    request: Request,
    admission: AbstractAsyncContextManager[Admission],
    count: int,
    render: Callable[[list[GenerationResult]], Any],
) -> JSONResponse:
    """Responds with all answers in one JSON object, made by `render`."""
    async with admission as admitted:
        results = await while_connected(request, collect(admitted.chunks, count))
    return JSONResponse(render(results), headers=admitted.headers)


async def respond_streaming(
    request: Request,
    admission: AbstractAsyncContextManager[Admission],
    render: Callable[[Chunks], AsyncGenerator[str, None]],
) -> StreamingResponse:
    """Responds with server-sent events, whose JSON is made by `render`.

    The first event is awaited here, so that an error before it has a status of its own.
    """
    async with AsyncExitStack() as stack:
        admitted = await stack.enter_async_context(admission)
        payloads = render(admitted.chunks)
        first = await while_connected(request, _first(payloads))
        # From here on, the response leaves the admission.
        return EventStreamResponse(first, payloads, request.state.request_id, admitted.headers, stack.pop_all())


async def _first(payloads: AsyncGenerator[str, None]) -> str:
    return await anext(payloads)


class EventStreamResponse(StreamingResponse):
    """Server-sent events of a generation.

    Args:
        first: payload of the first event.
        rest: payloads of the following events.
        request_id: id of the request, for the log.
        headers: headers of the response.
        resources: closed at the end of the generation, before the client sees the end, and however the response ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: str,
        rest: AsyncIterator[str],
        request_id: str,
        headers: Mapping[str, str],
        resources: AsyncExitStack,
    ) -> None:
        events = _events(first, rest, request_id, resources)
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        async with self._resources:
            await super().__call__(scope, receive, send)


async def _events(
    first: str, rest: AsyncIterator[str], request_id: str, resources: AsyncExitStack
) -> AsyncIterator[str]:
    try:
        async with resources:
            yield _event(first)
            async for payload in rest:
                yield _event(payload)
        yield "data: [DONE]\n\n"
    except LoramillError as error:
        yield _event(json.dumps(error_body(error)))
    except Exception:
        log.exception("request %s failed mid-stream", request_id, extra={"request": request_id})
        yield _event(json.dumps(error_body(internal_error(request_id))))


def _event(payload: str) -> str:
    return f"data: {payload}\n\n"
