"""What was read from the record a moment ago: most requests need no database, and none sees what is old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

from loramill.registry import Registry

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

#: Seconds for which an answer holds, counted from when it was asked for: what other processes write is seen so late.
SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _Flight(Generic[_V]):
    """A read that has begun, or is done: `mark` is the registry's when it began."""

    began: float
    mark: object
    task: asyncio.Task[_V]


class Remembered(Generic[_K, _V]):
    """Answers of the record by key, for the event loop.

    Many who ask for the same key at the same time wait for one read. What this process itself commits is seen by
    whoever asks after that. An error is told to those who waited for it, and isn't remembered. At most `most` keys
    are, and the oldest goes first.
    """

    def __init__(self, registry: Registry, read: Callable[[_K], _V], *, most: int = 10_000) -> None:
        self._registry, self._read, self._most = registry, read, most
        self._flights: dict[_K, _Flight[_V]] = {}

    async def get(self, key: _K) -> _V:
        """What `read` returns for a key, at most half a second old; raises what it raises."""
        flight = self._flights.get(key)
        if flight is None or not self._holds(flight):
            flight = self._begin(key)
        # Shielded, since one who goes away must not end the read for the others.
        return await asyncio.shield(flight.task)

    def _holds(self, flight: _Flight[_V]) -> bool:
        return flight.mark is self._registry.mark and time.monotonic() - flight.began < SECONDS

    def _begin(self, key: _K) -> _Flight[_V]:
        task = asyncio.create_task(run_in_threadpool(self._read, key))
        flight = _Flight(time.monotonic(), self._registry.mark, task)
        self._flights.pop(key, None)
        self._flights[key] = flight
        if len(self._flights) > self._most:
            del self._flights[next(iter(self._flights))]

        def forget_errors(task: asyncio.Task[_V]) -> None:
            failed = task.cancelled() or task.exception() is not None
            if failed and self._flights.get(key) is flight:
                del self._flights[key]

        task.add_done_callback(forget_errors)
        return flight
