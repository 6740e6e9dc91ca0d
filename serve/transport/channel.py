"""The way of tokens from engine replicas to a gateway: one TCP connection for each pair of them.

A chunk that travels by a Ray call costs about a millisecond on either side; 32 answers would cost more than the
model's step that made them. So a call goes by Ray (which routes, counts, drains and cancels it), and its chunks go by
a connection that the replica opens to the gateway which asked. What a step makes ready for one gateway is one frame:
its length in 4 bytes, then msgpack.

The gateway's address goes with each call, and with it a secret, which a connection must begin with.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import msgpack

from loramill.errors import Unavailable
from loramill.serve.protocol import SampledToken, TextChunk, TokenText

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("!I")
#: Bytes that may wait for a gateway that doesn't read; beyond them it has stopped, and its connection is closed.
_MAX_BUFFERED_BYTES = 64 << 20
_CONNECT_SECONDS = 5.0


class Address(NamedTuple):
    """Where a gateway receives, and the secret that opens it."""

    host: str
    port: int
    secret: str


class ReplicaLost(Unavailable):
    """The replica that was answering has gone."""


REPLICA_LOST = "The engine replica was lost while it answered; ask again."

#: What comes for a request: None when a replica has taken it, its chunks, or the reason why nothing more will come.
Arrival = TextChunk | Exception | None


class Receiver:
    """A gateway's end. Open it in the event loop that uses it."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._inboxes: dict[str, asyncio.Queue[Arrival]] = {}
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._connections: set[asyncio.StreamWriter] = set()

    async def address(self, host: str) -> Address:
        """Where replicas send to, as `host` is known to them; listens from the first call on."""
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    @contextmanager
    def inbox(self, request: str) -> Iterator[asyncio.Queue[Arrival]]:
        """What comes for a request from now on; what comes later is dropped."""
        self._inboxes[request] = asyncio.Queue()
        try:
            yield self._inboxes[request]
        finally:
            del self._inboxes[request]

    async def close(self) -> None:
        """Closes all connections."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._connections):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        open_: set[str] = set()
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                if hmac.compare_digest(await _read_frame(reader), self._secret.encode()):
                    while True:
                        self._dispatch(await _read_frame(reader), open_)
        finally:
            for request in open_:
                if inbox := self._inboxes.get(request):
                    inbox.put_nowait(ReplicaLost(REPLICA_LOST))
            self._connections.discard(writer)
            writer.close()

    def _dispatch(self, frame: bytes, open_: set[str]) -> None:
        """Puts chunks where they are waited for; keeps `open_` to those that this connection still owes chunks."""
        for request, chunk in msgpack.unpackb(frame):
            arrival = _unpack(chunk)
            if arrival is not None and arrival.finish:
                open_.discard(request)
            else:
                open_.add(request)
            if inbox := self._inboxes.get(request):
                inbox.put_nowait(arrival)
            else:
                open_.discard(request)


class Sender:
    """A replica's end, with a connection to each gateway that has asked."""

    def __init__(self) -> None:
        self._connections: dict[Address, asyncio.Task[_Connection]] = {}

    async def connect(self, address: Address) -> Callable[[str, TextChunk | None], None]:
        """What sends a request's chunks to a gateway, a connection being made where there is none.

        Raises:
            Unavailable: the gateway can't be reached.
        """
        if address not in self._connections or not await _is_usable(self._connections[address]):
            self._connections[address] = asyncio.create_task(_Connection.connect(address))
        return (await asyncio.shield(self._connections[address])).send

    async def close(self) -> None:
        """Closes all connections, what was sent being through."""
        for task in self._connections.values():
            if await _is_usable(task):
                await task.result().close()


class _Connection:
    """One connection. What is sent within one turn of the event loop leaves as one frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._ready: list[tuple[str, Any]] = []
        self._watch = asyncio.create_task(self._close_with(reader))

    @classmethod
    async def connect(cls, address: Address) -> _Connection:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(address.host, address.port)
        except OSError as error:  # a timeout is one, too
            raise Unavailable(f"The gateway at {address.host}:{address.port} can't be reached: {error!r}.") from error
        writer.write(_encode_frame(address.secret.encode()))
        return cls(reader, writer)

    @property
    def is_open(self) -> bool:
        return not self._writer.is_closing()

    def send(self, request: str, chunk: TextChunk | None) -> None:
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._flush)
        self._ready.append((request, _pack(chunk)))

    async def close(self) -> None:
        self._flush()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _close_with(self, reader: asyncio.StreamReader) -> None:
        """Closes this end when the gateway, which says nothing, has closed the other."""
        with suppress(ConnectionError):
            await reader.read()
        self._writer.close()

    def _flush(self) -> None:
        ready, self._ready = self._ready, []
        if not ready or not self.is_open:
            return
        self._writer.write(_encode_frame(msgpack.packb(ready)))
        if self._writer.transport.get_write_buffer_size() > _MAX_BUFFERED_BYTES:
            log.error("a gateway has stopped reading; its connection is closed")
            self._writer.transport.abort()


async def _is_usable(line: asyncio.Task[_Connection]) -> bool:
    """Whether a connection was made and is open; one that is being made is waited for."""
    try:
        return (await asyncio.shield(line)).is_open
    except Unavailable:
        return False


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


def _encode_frame(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


def _pack(chunk: TextChunk | None) -> Any:
    if chunk is None:
        return None
    tokens = [[_fields(token.token), *map(_fields, token.top)] for token in chunk.logprobs]
    return chunk.text, chunk.prompt_tokens, chunk.completion_tokens, chunk.finish, tokens


def _unpack(packed: Any) -> TextChunk | None:
    if packed is None:
        return None
    text, prompt_tokens, completion_tokens, finish, tokens = packed
    logprobs = tuple(
        SampledToken(TokenText(*chosen), tuple(TokenText(*each) for each in top)) for chosen, *top in tokens
    )
    return TextChunk(text, prompt_tokens, completion_tokens, finish, logprobs)


def _fields(token: TokenText) -> tuple[str, float | None, bytes | None]:
    return token.text, token.logprob, token.raw
