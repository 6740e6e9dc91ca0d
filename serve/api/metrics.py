"""GET /metrics, and where the gateway observes what it counts."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramill.errors import LoramillError, Overloaded, Unavailable
from loramill.serve import metrics
from loramill.serve.api.answers import Chunks
from loramill.serve.api.auth import Caller
from loramill.serve.api.gateway import Gateway, Who
from loramill.serve.api.lookup import Target
from loramill.serve.exposition import MEDIA_TYPE, exposition
from loramill.serve.protocol import TextChunk, TextRequest

router = APIRouter(tags=["health"])

#: The code that is counted where all was answered, and where the caller went away before.
DONE, GONE = 200, 499

#: What comes first, for nobody: from then on, closing the rest is noticed.
_BEGUN = (0, TextChunk("", 0, 0))

_tenant_label = metrics.Bounded(metrics.TENANTS)
_adapter_label = metrics.Bounded(metrics.ADAPTERS)


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(who: Who) -> Response:
    """What Prometheus reads, with an admin's key: it names tenants."""
    who.check_admin()
    return Response(await run_in_threadpool(exposition), media_type=MEDIA_TYPE)


class CountRequests:
    """Pure ASGI: counts all requests by their endpoint and status."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        code = GONE

        async def noting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            # The router notes what it found; the path itself may be anything that a caller thinks of.
            endpoint = scope["route"].path if "route" in scope else "(none)"
            metrics.HTTP_REQUESTS.labels(endpoint, code).inc()


class _Watch:
    """One generation: whom it is counted to, and how far its answers are."""

    def __init__(self, target: Target, requests: Sequence[TextRequest], n: int) -> None:
        self._began = time.perf_counter()
        self._n = n
        self._endpoint = "chat" if requests[0].messages else "completions"
        self._tenant = _tenant_label(target.tenant) if target.tenant else metrics.ADMIN
        self._adapter = target.name if target.version is None else _adapter_label(target.name)
        who = self._tenant, self._adapter
        self._first_token = metrics.FIRST_TOKEN.labels(*who)
        self._between_tokens = metrics.BETWEEN_TOKENS.labels(self._tenant)
        self._prompt_tokens = metrics.PROMPT_TOKENS.labels(*who)
        self._completion_tokens = metrics.COMPLETION_TOKENS.labels(*who)
        self._times: dict[int, float] = {}
        self._tokens = [0] * len(requests)
        self._unfinished = len(requests)

    def chunk(self, index: int, chunk: TextChunk) -> None:
        """Notes a chunk; on a busy gateway that must cost some microseconds and no more."""
        now, more = time.perf_counter(), chunk.completion_tokens - self._tokens[index]
        if index not in self._times:
            self._first_token.observe(now - self._began)
            if index % self._n == 0:  # the first of the answers to a prompt, which follow each other
                self._prompt_tokens.inc(chunk.prompt_tokens)
        elif more:
            self._between_tokens.observe((now - self._times[index]) / more)
        self._completion_tokens.inc(more)
        self._times[index], self._tokens[index] = now, chunk.completion_tokens
        self._unfinished -= chunk.finish is not None

    @property
    def whole(self) -> bool:
        """Whether every answer has its end, even if nobody asked for what comes behind it."""
        return not self._unfinished

    def ended(self, code: int) -> None:
        """Notes the end."""
        metrics.REQUESTS.labels(self._endpoint, self._tenant, self._adapter, code).inc()
        if code == DONE:
            metrics.DURATION.labels(self._tenant).observe(time.perf_counter() - self._began)

    def refused(self, error: LoramillError) -> None:
        """Notes an error, if it says that there is no place for the whole generation."""
        if not self._times and error.status in (Overloaded.status, Unavailable.status):
            metrics.REFUSED.labels(self._tenant, error.code).inc()


class Admit(Protocol):
    """What generations pass, see `admission`."""

    async def __call__(
        self, here: Gateway, who: Caller, target: Target, requests: Sequence[TextRequest], n: int = 1
    ) -> tuple[Chunks, Mapping[str, str]]:
        """Returns the chunks and the response's headers."""
        ...


def watched(admit: Admit) -> Admit:
    """Counts what `admit` refuses, and watches what it lets through."""

    @functools.wraps(admit)
    async def watching(
        here: Gateway, who: Caller, target: Target, requests: Sequence[TextRequest], n: int = 1
    ) -> tuple[Chunks, Mapping[str, str]]:
        watch = _Watch(target, requests, n)
        try:
            chunks, headers = await admit(here, who, target, requests, n)
        except LoramillError as error:
            watch.refused(error)
            watch.ended(error.status)
            raise
        passing = _passing(chunks, watch)
        await anext(passing)
        return passing, headers

    return watching


async def _passing(chunks: Chunks, watch: _Watch) -> Chunks:
    code = GONE
    metrics.IN_FLIGHT.inc()
    try:
        async with aclosing(chunks):
            yield _BEGUN
            async for index, chunk in chunks:
                watch.chunk(index, chunk)
                yield index, chunk
        code = DONE
    except LoramillError as error:
        code = error.status
        watch.refused(error)
        raise
    except Exception:
        code = LoramillError.status
        raise
    finally:
        metrics.IN_FLIGHT.dec()
        watch.ended(DONE if watch.whole else code)
