"""An HTTP client that sends streams of requests to an OpenAI-compatible server, with little CPU time of its own.

Received bytes are stored with their times and parsed after the run, which leaves the cores to the server.
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
from loramill_bench.http.workload import OUTPUT_TOKENS, CompletionRequest, Stream

#: Maximum duration of a run.
TIMEOUT_SECONDS = 900.0

#: A piece of a body, and its time of arrival.
Piece = tuple[float, bytes]


@dataclass(frozen=True, slots=True)
class Server:
    """The address of a server; `key` is its API key, empty if none is required."""

    port: int
    key: str = ""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """The address, without `/v1`."""
        return f"http://{self.host}:{self.port}"


def run(server: Server, streams: Sequence[Stream], timeout_seconds: float = TIMEOUT_SECONDS) -> Run:
    """Sends all requests of the streams and receives the answers.

    Raises:
        DeadlineExceeded: The run took longer than `timeout_seconds`.
    """
    return asyncio.run(_run(server, streams, timeout_seconds))


async def _run(server: Server, streams: Sequence[Stream], timeout_seconds: float) -> Run:
    exchanges: list[_Exchange] = []
    cpu, begun = time.process_time(), time.perf_counter()
    try:
        async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(_follow(server, stream, begun, exchanges))
    except TimeoutError as error:
        missing = sum(len(stream.requests) for stream in streams) - sum(exchange.done.done() for exchange in exchanges)
        raise DeadlineExceeded(
            f"After {timeout_seconds:g} s {missing} requests to {server.url} have not ended."
        ) from error
    spent, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return Run(spent, cpu, tuple(exchange.answer() for exchange in exchanges))


async def _follow(server: Server, stream: Stream, begun: float, exchanges: list[_Exchange]) -> None:
    """Sends a stream's requests one after another, over one connection as long as the server keeps it open."""
    requests = [_request(server, request) for request in stream.requests]
    await asyncio.sleep(begun + stream.start_seconds - time.perf_counter())
    connection: _Connection | None = None
    for request in requests:
        exchange = _Exchange()
        exchanges.append(exchange)
        try:
            if connection is None or connection.closed:
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, server.host, server.port
                )
            await connection.send(request, exchange)
        except OSError as error:
            exchange.broken = f"the connection failed: {error}"
    if connection is not None:
        connection.close()


def _request(server: Server, request: CompletionRequest) -> bytes:
    body = json.dumps(
        {
            "model": request.model,
            "prompt": request.prompt,
            "max_tokens": OUTPUT_TOKENS,
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
    """A request and its response, which the parser's callbacks fill in."""

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
        return _parse_answer(self.begun, self.pieces, seconds)


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
            self._exchange.done.set_exception(ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)

    async def send(self, request: bytes, exchange: _Exchange) -> None:
        self._exchange = exchange
        exchange.begun = time.perf_counter()
        self._transport.write(request)
        await exchange.done
        self.closed |= exchange.last

    def close(self) -> None:
        self._transport.close()


def _parse_answer(begun: float, pieces: Sequence[Piece], seconds: float) -> Answer:
    """Parses the server-sent events of an answer."""
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
    return Answer.completed(tokens, tuple(times), seconds)


def _events(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The data of each event, with the arrival time of its last byte."""
    rest = b""
    for when, piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            yield when, event.removeprefix(b"data: ")
