"""Streams of requests to a server that speaks OpenAI's API, at as little cost of its own as can be.

What comes is noted with its time, and understood once all have ended: the cores belong to the server meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from httptools import HttpResponseParser

from loramill.errors import DeadlineExceeded
from loramill_bench.http.answers import Answer, Run
from loramill_bench.http.work import NEW, Ask, Stream

#: Seconds after which a run is given up.
LIMIT = 900.0

#: A piece of a body, and when it came.
Piece = tuple[float, bytes]


@dataclass(frozen=True, slots=True)
class Server:
    """Where something listens; `key` is its API key, empty where it wants none."""

    port: int
    key: str = ""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """The address, without `/v1`."""
        return f"http://{self.host}:{self.port}"


def run(server: Server, streams: Sequence[Stream], limit: float = LIMIT) -> Run:
    """Asks all that the streams ask.

    Raises:
        DeadlineExceeded: that took more than `limit` seconds.
    """
    return asyncio.run(_run(server, streams, limit))


async def _run(server: Server, streams: Sequence[Stream], limit: float) -> Run:
    exchanges: list[_Exchange] = []
    cpu, begun = time.process_time(), time.perf_counter()
    try:
        async with asyncio.timeout(limit), asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(_follow(server, stream, begun, exchanges))
    except TimeoutError as error:
        missing = sum(len(stream.asks) for stream in streams) - sum(exchange.done.done() for exchange in exchanges)
        raise DeadlineExceeded(f"After {limit:g} s {missing} requests to {server.url} have not ended.") from error
    spent, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return Run(spent, cpu, tuple(exchange.answer() for exchange in exchanges))


async def _follow(server: Server, stream: Stream, begun: float, exchanges: list[_Exchange]) -> None:
    """Asks a stream's requests over a connection that is kept as long as the server keeps it."""
    requests = [_request(server, ask) for ask in stream.asks]
    await asyncio.sleep(begun + stream.begins - time.perf_counter())
    connection: _Connection | None = None
    for request in requests:
        exchange = _Exchange()
        exchanges.append(exchange)
        try:
            if connection is None or connection.closed:
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, server.host, server.port
                )
            await connection.ask(request, exchange)
        except OSError as error:
            exchange.broken = f"the connection failed: {error}"
    if connection is not None:
        connection.close()


def _request(server: Server, ask: Ask) -> bytes:
    body = json.dumps(
        {
            "model": ask.model,
            "prompt": ask.prompt,
            "max_tokens": NEW,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = [
        "POST /v1/completions HTTP/1.1",
        f"host: {server.host}:{server.port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *([f"authorization: Bearer {server.key}"] if server.key else []),
    ]
    return "\r\n".join([*head, "", body]).encode()


class _Exchange:
    """A request that is under way or has ended, as the parser tells it."""

    def __init__(self) -> None:
        self.broken = ""
        self.begun = self.ended = 0.0
        self.status = 0
        self.last = self.retry_after = False
        self.pieces: list[Piece] = []
        self.done = asyncio.get_running_loop().create_future()
        self._parser = HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.retry_after |= name.lower() == b"retry-after"

    def on_body(self, body: bytes) -> None:
        self.pieces.append((time.perf_counter(), body))

    def on_message_complete(self) -> None:
        self.ended = time.perf_counter()
        self.status = self._parser.get_status_code()
        self.last = not self._parser.should_keep_alive()
        self.done.set_result(None)

    def answer(self) -> Answer:
        seconds = self.ended - self.begun
        if self.broken:
            return Answer(fault=self.broken)
        if self.status == 429 and self.retry_after:
            return Answer(seconds=seconds, refused=True)
        if self.status != 200:
            body = b"".join(body for _, body in self.pieces)
            return Answer(seconds=seconds, fault=f"HTTP {self.status}: {body[:300].decode(errors='replace')}")
        return _understood(self.begun, self.pieces, seconds)


class _Connection(asyncio.Protocol):
    """An HTTP/1.1 connection that carries one exchange at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._exchange: _Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._exchange is not None and not self._exchange.done.done():
            self._exchange.done.set_exception(ConnectionResetError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)

    async def ask(self, request: bytes, exchange: _Exchange) -> None:
        self._exchange = exchange
        exchange.begun = time.perf_counter()
        self._transport.write(request)
        await exchange.done
        self.closed |= exchange.last

    def close(self) -> None:
        self._transport.close()


def _understood(begun: float, pieces: Sequence[Piece], seconds: float) -> Answer:
    """The answer that server-sent events make."""
    times, tokens, last = [], 0, b""
    for when, last in _events(pieces):
        if last == b"[DONE]":
            break
        event = json.loads(last)
        if error := event.get("error"):
            return Answer(seconds=seconds, fault=f"in the stream: {error}")
        if event["choices"]:
            times.append(when - begun)
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
    if last != b"[DONE]":
        return Answer(seconds=seconds, fault="the stream ended before its end")
    return Answer.whole(tokens, tuple(times), seconds)


def _events(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The events' data, each with the time at which its last byte came."""
    rest = b""
    for when, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            yield when, event.removeprefix(b"data: ")
