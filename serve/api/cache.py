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
TTL_SECONDS = 0.5

#: Seconds that a read may take before the database counts as away: a server that vanished does not refuse connections.
READ_TIMEOUT_SECONDS = 3.0


@dataclass(slots=True, eq=False)
class _PendingRead(Generic[_V]):
    """A read that waits for its turn, goes on, or is done: `mark` is the registry's when it began."""

    started_at: float = 0.0
    mark: object = None
    future: asyncio.Future[_V] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, slots=True)
class _CachedValue(Generic[_V]):
    """An answer that was read at `at`, when the registry's mark was `mark`."""

    value: _V
    read_at: float
    mark: object


class ReadThroughCache(Generic[_K, _V]):
    """Answers of the record by key, for the event loop.

    Many who ask for the same key at the same time wait for one read. One thread reads, all keys that were asked for
    while it was busy in one session: with as many threads as keys, each read would take ten times as long. What this
    process itself commits is seen by whoever asks after that. An error is told to those who waited for it, and isn't
    remembered. At most `most` keys are, and the oldest goes first.

    Args:
        grace: seconds for which an answer is valid while the database is away, from when it was read.
    """

    def __init__(
        self,
        registry: Registry,
        read: Callable[[Session, _K], _V],
        *,
        max_entries: int = 10_000,
        grace_seconds: float = 0.0,
    ) -> None:
        self._registry, self._read, self._max_entries, self._grace_seconds = registry, read, max_entries, grace_seconds
        self._cached: dict[_K, _CachedValue[_V]] = {}
        #: When a read last failed because the database was away; None: the last read succeeded.
        self._unavailable_since: float | None = None
        self._reads: dict[_K, _PendingRead[_V]] = {}
        self._queued: dict[_K, _PendingRead[_V]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def get(self, key: _K) -> _V:
        """What `read` returns for a key, at most half a second old; raises what it raises.

        While the database is away, at most the grace old.
        """
        known = self._cached_within_grace(key)
        if (
            known is not None
            and self._unavailable_since is not None
            and time.monotonic() - self._unavailable_since < TTL_SECONDS
        ):
            return known.value
        flight = self._queued.get(key)
        if flight is None:
            flight = self._reads.get(key)
            if flight is None or not self._is_fresh(flight):
                flight = self._enqueue(key)
        if known is None:
            # Shielded, since one who goes away must not end the read for the others.
            return await asyncio.shield(flight.future)
        try:
            # In an outage no request waits: the read in the background shows when it is over.
            async with asyncio.timeout(READ_TIMEOUT_SECONDS if self._unavailable_since is None else 0):
                return await asyncio.shield(flight.future)
        except TimeoutError:
            self._unavailable_since = time.monotonic()
        except Unavailable:
            pass
        return known.value

    def _cached_within_grace(self, key: _K) -> _CachedValue[_V] | None:
        known = self._cached.get(key)
        if (
            known is None
            or known.mark is not self._registry.commit_token
            or time.monotonic() - known.read_at >= self._grace_seconds
        ):
            return None
        return known

    def _is_fresh(self, flight: _PendingRead[_V]) -> bool:
        return flight.mark is self._registry.commit_token and time.monotonic() - flight.started_at < TTL_SECONDS

    def _enqueue(self, key: _K) -> _PendingRead[_V]:
        flight: _PendingRead[_V] = _PendingRead()
        self._reads.pop(key, None)
        self._reads[key] = self._queued[key] = flight
        if len(self._reads) > self._max_entries:
            del self._reads[next(iter(self._reads))]
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_queued())
        return flight

    async def _read_queued(self) -> None:
        """Reads until nobody waits."""
        while self._queued:
            now, self._queued = self._queued, {}
            for flight in now.values():
                flight.started_at, flight.mark = time.monotonic(), self._registry.commit_token
            try:
                answers = await run_in_threadpool(self._read_all, list(now))
                self._unavailable_since = None
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                self._unavailable_since = time.monotonic() if isinstance(error, Unavailable) else None
                answers = dict.fromkeys(now, error)
            for key, flight in now.items():
                self._finish(key, flight, answers[key])

    def _read_all(self, keys: Sequence[_K]) -> Mapping[_K, _V | Exception]:
        with self._registry.reading() as session:
            return {key: self._read_one(session, key) for key in keys}

    def _read_one(self, session: Session, key: _K) -> _V | LoramillError:
        try:
            return self._read(session, key)
        except LoramillError as error:
            return error

    def _finish(self, key: _K, flight: _PendingRead[_V], answer: _V | Exception) -> None:
        if not isinstance(answer, Exception):
            flight.future.set_result(answer)
            self._store(key, _CachedValue(answer, flight.started_at, flight.mark))
            return
        if not isinstance(answer, Unavailable):
            self._cached.pop(key, None)  # it no longer exists
        flight.future.set_exception(answer)
        flight.future.exception()  # whoever waited may have gone
        if self._reads.get(key) is flight:
            del self._reads[key]

    def _store(self, key: _K, known: _CachedValue[_V]) -> None:
        if not self._grace_seconds:
            return
        self._cached.pop(key, None)
        self._cached[key] = known
        if len(self._cached) > self._max_entries:
            del self._cached[next(iter(self._cached))]
