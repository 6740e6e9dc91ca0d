"""What was read from the database a moment ago: most requests need no database, and none sees what is old.

If the database is away, what was read before is valid for some minutes of grace, so that a failover does not take all
endpoints down. Changes of other processes (for example a revoked key) are then seen that much later; answers are never
older than a change by this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from loramill.errors import LoramillError, Unavailable
from loramill.registry import Registry

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

#: Seconds for which an answer holds, counted from when it was asked for: what other processes write is seen so late.
SECONDS = 0.5

#: Seconds that a read may take before the database counts as away: a server that vanished does not refuse connections.
PATIENCE = 3.0


@dataclass(slots=True, eq=False)
class _Flight(Generic[_V]):
    """A read that waits for its turn, goes on, or is done: `mark` is the registry's when it began."""

    began: float = 0.0
    mark: object = None
    answer: asyncio.Future[_V] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, slots=True)
class _Known(Generic[_V]):
    """An answer that was read at `at`, when the registry's mark was `mark`."""

    value: _V
    at: float
    mark: object


class Remembered(Generic[_K, _V]):
    """Answers of the record by key, for the event loop.

    Many who ask for the same key at the same time wait for one read. One thread reads, all keys that were asked for
    while it was busy in one session: with as many threads as keys, each read would take ten times as long. What this
    process itself commits is seen by whoever asks after that. An error is told to those who waited for it, and isn't
    remembered. At most `most` keys are, and the oldest goes first.

    Args:
        grace: seconds for which an answer is valid while the database is away, from when it was read.
    """

    def __init__(
        self, registry: Registry, read: Callable[[Session, _K], _V], *, most: int = 10_000, grace: float = 0.0
    ) -> None:
        self._registry, self._read, self._most, self._grace = registry, read, most, grace
        self._known: dict[_K, _Known[_V]] = {}
        #: When a read last failed because the database was away; None: the last read succeeded.
        self._away: float | None = None
        self._flights: dict[_K, _Flight[_V]] = {}
        self._waiting: dict[_K, _Flight[_V]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def get(self, key: _K) -> _V:
        """What `read` returns for a key, at most half a second old; raises what it raises.

        While the database is away, at most the grace old.
        """
        known = self._within_grace(key)
        if known is not None and self._away is not None and time.monotonic() - self._away < SECONDS:
            return known.value
        flight = self._waiting.get(key)
        if flight is None:
            flight = self._flights.get(key)
            if flight is None or not self._holds(flight):
                flight = self._begin(key)
        if known is None:
            # Shielded, since one who goes away must not end the read for the others.
            return await asyncio.shield(flight.answer)
        try:
            # In an outage no request waits: the read in the background shows when it is over.
            async with asyncio.timeout(PATIENCE if self._away is None else 0):
                return await asyncio.shield(flight.answer)
        except TimeoutError:
            self._away = time.monotonic()
        except Unavailable:
            pass
        return known.value

    def _within_grace(self, key: _K) -> _Known[_V] | None:
        known = self._known.get(key)
        if known is None or known.mark is not self._registry.mark or time.monotonic() - known.at >= self._grace:
            return None
        return known

    def _holds(self, flight: _Flight[_V]) -> bool:
        return flight.mark is self._registry.mark and time.monotonic() - flight.began < SECONDS

    def _begin(self, key: _K) -> _Flight[_V]:
        flight: _Flight[_V] = _Flight()
        self._flights.pop(key, None)
        self._flights[key] = self._waiting[key] = flight
        if len(self._flights) > self._most:
            del self._flights[next(iter(self._flights))]
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_on())
        return flight

    async def _read_on(self) -> None:
        """Reads until nobody waits."""
        while self._waiting:
            now, self._waiting = self._waiting, {}
            for flight in now.values():
                flight.began, flight.mark = time.monotonic(), self._registry.mark
            try:
                answers = await run_in_threadpool(self._read_all, list(now))
                self._away = None
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                self._away = time.monotonic() if isinstance(error, Unavailable) else None
                answers = dict.fromkeys(now, error)
            for key, flight in now.items():
                self._land(key, flight, answers[key])

    def _read_all(self, keys: Sequence[_K]) -> Mapping[_K, _V | Exception]:
        with self._registry.reading() as session:
            return {key: self._read_one(session, key) for key in keys}

    def _read_one(self, session: Session, key: _K) -> _V | LoramillError:
        try:
            return self._read(session, key)
        except LoramillError as error:
            return error

    def _land(self, key: _K, flight: _Flight[_V], answer: _V | Exception) -> None:
        if not isinstance(answer, Exception):
            flight.answer.set_result(answer)
            self._note(key, _Known(answer, flight.began, flight.mark))
            return
        if not isinstance(answer, Unavailable):
            self._known.pop(key, None)  # it no longer exists
        flight.answer.set_exception(answer)
        flight.answer.exception()  # whoever waited may have gone
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _note(self, key: _K, known: _Known[_V]) -> None:
        if not self._grace:
            return
        self._known.pop(key, None)
        self._known[key] = known
        if len(self._known) > self._most:
            del self._known[next(iter(self._known))]
