"""The HTTP port of a gateway without a proxy in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from loramill.errors import PortTaken, Unavailable

#: Maximum number of connections that wait to be accepted.
_BACKLOG = 2048

#: Seconds for which an idle connection stays open: longer than clients keep theirs (httpx 5 s, load balancers 60);
#: otherwise a client could send a request at the moment at which the connection is closed here.
_KEEP_ALIVE_SECONDS = 75


class HttpServer:
    """Serves an app on a port that the gateways of one machine share; the kernel distributes the connections."""

    def __init__(self, app: FastAPI, host: str, port: int, *, drain_seconds: float) -> None:
        self._sockets = [listening_socket(host, port)]
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, int(drain_seconds)),
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts to serve; returns when the port answers."""
        self._task = asyncio.create_task(self._server.serve(self._sockets))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        self.check()

    def check(self) -> None:
        """Raises Unavailable unless the port is served."""
        if self._task is None or self._task.done():
            raise Unavailable("The gateway's HTTP server has stopped; it is being replaced, try again in a moment.")

    async def drain(self) -> None:
        """Accepts no more connections; returns when all responses are complete, or `drain_seconds` are over."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class _Server(uvicorn.Server):
    """Leaves signals to the process in which it runs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket on a port that other processes of this user may share.

    Raises:
        PortTaken: another program listens there, or the address is not this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        message = f"{host}:{port} is not available ({error.strerror}): stop the program that uses it."
        raise PortTaken(message) from error
    return listener
