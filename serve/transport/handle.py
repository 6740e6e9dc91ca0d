"""The engine replicas of one base behind a Ray Serve handle, as a `GenerationBackend` of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from loramill.errors import LoramillError, Overloaded, Unavailable
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.ray_private import by_value
from loramill.serve.transport.channel import REPLICA_LOST, Arrival, Receiver, ReplicaLost

#: Seconds after the end of a call within which its last chunk must arrive.
_LAST_CHUNK_SECONDS = 5.0


class HandleBackend:
    """Calls go by Serve's handle, which routes, counts and cancels them; their chunks arrive by a `Receiver`.

    Args:
        handle: handle of the base's engine deployment.
        receiver: the gateway's, which its backends share.
        start_seconds: time for which a request waits until a replica accepts it.
        scales_to_zero: whether the base may have no replicas; a request starts one.
    """

    def __init__(
        self, handle: DeploymentHandle, receiver: Receiver, *, start_seconds: float, scales_to_zero: bool
    ) -> None:
        self._handle = by_value(handle)
        self._receiver = receiver
        self._start_seconds = start_seconds
        self._scales_to_zero = scales_to_zero
        # Keeps references: the event loop has only weak ones.
        self._calls: set[asyncio.Future[None]] = set()

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer; closing the iterator cancels it at the replica.

        A request whose replica is lost before the first chunk is sent once more, to another replica.
        """
        begun = done = False
        for again in (True, False):
            with self._receiver.inbox(request.id) as inbox:
                response = await self._call_replica(request, inbox)
                try:
                    chunk = await self._first_arrival(inbox)
                    while not done:
                        if chunk is not None:
                            begun = True
                            yield chunk
                            done = chunk.finish is not None
                        chunk = None if done else _raise_errors(await inbox.get())
                    return
                except ReplicaLost:
                    if begun or not again:
                        raise
                finally:
                    if not done:
                        response.cancel()

    async def ready(self) -> None:
        """Raises Unavailable until an engine replica answers. A base that may scale to zero is always ready."""
        if self._scales_to_zero:
            return
        try:
            await self._handle.check_health.remote()
        except (RayTaskError, RayActorError, DeploymentUnavailableError) as error:
            raise Unavailable("No engine replica is running yet; try again in a moment.") from error

    async def _call_replica(
        self, request: TextRequest, inbox: asyncio.Queue[Arrival]
    ) -> DeploymentResponse[LoramillError | None]:
        """Calls a replica; a failure of the call is put into the inbox."""
        address = await self._receiver.address(ray.util.get_node_ip_address())
        response = self._handle.answer.remote(request, address)
        call = asyncio.ensure_future(_follow(response, inbox))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return response

    async def _first_arrival(self, inbox: asyncio.Queue[Arrival]) -> TextChunk | None:
        try:
            async with asyncio.timeout(self._start_seconds):
                return _raise_errors(await inbox.get())
        except TimeoutError as error:
            raise Unavailable(
                f"No engine replica could accept the request within {self._start_seconds:g} s; the base may still be "
                "starting, try again in a moment."
            ) from error


async def _follow(response: DeploymentResponse[LoramillError | None], inbox: asyncio.Queue[Arrival]) -> None:
    """Puts the error of a failed call into the inbox. A call that succeeded has sent all, or its connection broke."""
    try:
        refusal = await response
    except RequestCancelledError:
        return
    except Exception as error:  # noqa: BLE001 - raised by the reader of the inbox
        inbox.put_nowait(_translate_error(error))
    else:
        if refusal is not None:
            inbox.put_nowait(refusal)
        else:
            asyncio.get_running_loop().call_later(_LAST_CHUNK_SECONDS, inbox.put_nowait, ReplicaLost(REPLICA_LOST))


def _translate_error(error: Exception) -> Exception:
    """The error for the gateway's client."""
    if isinstance(error, BackPressureError):
        return Overloaded("Every engine replica is at its limit; try again in a moment.")
    if isinstance(error, RayActorError | DeploymentUnavailableError):
        return ReplicaLost(REPLICA_LOST)
    return error


def _raise_errors(arrival: Arrival) -> TextChunk | None:
    if isinstance(arrival, Exception):
        raise arrival
    return arrival
