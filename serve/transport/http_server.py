"""A gateway's own HTTP port, without a proxy before it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from loramill.errors import PortTaken, Unavailable

#: Connections that may wait to be accepted.
_BACKLOG = 2048

#: For which an idle connection stays open: longer than clients keep theirs (httpx 5 s, balancers 60), or one that is
#: closed here is used there at the same moment.
_KEEP_ALIVE_SECONDS = 75


class HttpServer:
    """Serves an app on a port, which gateways of one machine share: the kernel spreads connections over them."""

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
        """Returns when the port answers."""
        self._task = asyncio.create_task(self._server.serve(self._sockets))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        self.check()

    def check(self) -> None:
        """Raises Unavailable unless the port is served."""
        if self._task is None or self._task.done():
            raise Unavailable("The gateway's HTTP server has ended; it is being replaced, try again in a moment.")

    async def drain(self) -> None:
        """Takes no more connections; returns when all answers are through, or the time for it is up."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class _Server(uvicorn.Server):
    """Leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket on a port that other processes of this user may share.

    Raises:
        PortTaken: something else listens there, or it isn't this machine's address.
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
        message = f"{host}:{port} can't be listened on ({error.strerror}): end the program that uses it."
        raise PortTaken(message) from error
    return listener
