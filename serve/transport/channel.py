"""Streams tokens from engine replicas to gateways: one TCP connection per pair of them.

A chunk that travels by a Ray call costs about a millisecond at either end; for 32 answers that is more than the model's
step. So a call goes by Ray (which routes, counts, drains and cancels it), and its chunks go by a connection that the
replica opens to the calling gateway. What a step makes ready for one gateway is one frame.

A call carries the gateway's address, and with it a secret that a connection must begin with.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from loramill.errors import Unavailable
from loramill.serve.protocol import TextChunk
from loramill.serve.transport.frames import ReplicaMessage, frame, pack_messages, read_frame, unpack_messages

log = logging.getLogger(__name__)

#: Bytes that may wait for a gateway that does not read; beyond this, it hangs, and its connection is closed.
_MAX_BUFFERED_BYTES = 64 << 20
_CONNECT_SECONDS = 5.0


class Address(NamedTuple):
    """Where a gateway listens, and the secret that a connection begins with."""

    host: str
    port: int
    secret: str


class ReplicaLost(Unavailable):
    """The replica that was answering is gone."""


REPLICA_LOST = "The engine replica was lost while it answered; try again."

#: What a gateway receives for a request: None when a replica has accepted it, chunks, or the error that ends it.
Arrival = TextChunk | Exception | None


class Receiver:
    """A gateway's end. Create it in the event loop that uses it."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._inboxes: dict[str, asyncio.Queue[Arrival]] = {}
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._connections: set[asyncio.StreamWriter] = set()

    async def address(self, host: str) -> Address:
        """The address for replicas, which reach this machine as `host`; the first call starts to listen."""
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    @contextmanager
    def inbox(self, request: str) -> Iterator[asyncio.Queue[Arrival]]:
        """Receives what arrives for a request inside the context; later arrivals are dropped."""
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
        unfinished: set[str] = set()
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                if hmac.compare_digest(await read_frame(reader), self._secret.encode()):
                    while True:
                        self._dispatch(await read_frame(reader), unfinished)
        finally:
            for request in unfinished:
                if inbox := self._inboxes.get(request):
                    inbox.put_nowait(ReplicaLost(REPLICA_LOST))
            self._connections.discard(writer)
            writer.close()

    def _dispatch(self, content: bytes, unfinished: set[str]) -> None:
        """Puts chunks into their inboxes, and updates the set of requests that this connection must still finish."""
        for request, chunk in unpack_messages(content):
            if chunk is not None and chunk.finish:
                unfinished.discard(request)
            else:
                unfinished.add(request)
            if inbox := self._inboxes.get(request):
                inbox.put_nowait(chunk)
            else:
                unfinished.discard(request)


class Sender:
    """A replica's end, with a connection to each gateway that has called it."""

    def __init__(self) -> None:
        self._connections: dict[Address, asyncio.Task[_Connection]] = {}

    async def connect(self, address: Address) -> Callable[[str, TextChunk | None], None]:
        """Returns a function that sends a request's chunks to a gateway; connects if there is no connection.

        Raises:
            Unavailable: the gateway is unreachable.
        """
        if address not in self._connections or not await _is_usable(self._connections[address]):
            self._connections[address] = asyncio.create_task(_Connection.connect(address))
        return (await asyncio.shield(self._connections[address])).send

    async def close(self) -> None:
        """Closes all connections after everything was sent."""
        for task in self._connections.values():
            if await _is_usable(task):
                await task.result().close()


class _Connection:
    """One connection. Messages that are sent in one turn of the event loop leave as one frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._ready: list[ReplicaMessage] = []
        self._closing = asyncio.create_task(self._close_with_peer(reader))

    @classmethod
    async def connect(cls, address: Address) -> _Connection:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(address.host, address.port)
        except OSError as error:  # includes the timeout
            raise Unavailable(f"The gateway at {address.host}:{address.port} is unreachable: {error!r}.") from error
        writer.write(frame(address.secret.encode()))
        return cls(reader, writer)

    @property
    def is_open(self) -> bool:
        return not self._writer.is_closing()

    def send(self, request: str, chunk: TextChunk | None) -> None:
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._flush)
        self._ready.append(ReplicaMessage(request, chunk))

    async def close(self) -> None:
        self._flush()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _close_with_peer(self, reader: asyncio.StreamReader) -> None:
        """Closes this end when the gateway, which sends nothing, has closed the other."""
        with suppress(ConnectionError):
            await reader.read()
        self._writer.close()

    def _flush(self) -> None:
        ready, self._ready = self._ready, []
        if not ready or not self.is_open:
            return
        self._writer.write(pack_messages(ready))
        if self._writer.transport.get_write_buffer_size() > _MAX_BUFFERED_BYTES:
            log.error("a gateway does not read; its connection is closed")
            self._writer.transport.abort()


async def _is_usable(connection: asyncio.Task[_Connection]) -> bool:
    """Whether a connection was made and is open; waits for one that is being made."""
    try:
        return (await asyncio.shield(connection)).is_open
    except Unavailable:
        return False
