"""A short-lived cache of database reads, so that most requests need no database.

While the database is unavailable, values stay valid for a grace period of some minutes, so that a failover does not
take all endpoints down. Changes by other processes (for example a revoked key) are then seen that much later. A value
is never older than a change by this process.
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

#: Seconds for which a value is valid after its read began. Changes by other processes are seen this much later.
TTL_SECONDS = 0.5

#: Seconds after which a read counts as failed: a database server that vanished does not refuse connections.
READ_TIMEOUT_SECONDS = 3.0


@dataclass(slots=True, eq=False)
class _PendingRead(Generic[_V]):
    """A read that is queued, running or done, with the registry's commit token when it began."""

    started_at: float = 0.0
    commit_token: object = None
    future: asyncio.Future[_V] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, slots=True)
class _CachedValue(Generic[_V]):
    """A value, when its read began, and the registry's commit token at that time."""

    value: _V
    read_at: float
    commit_token: object


class ReadThroughCache(Generic[_K, _V]):
    """Caches values of the registry by key, for the event loop.

    Concurrent requests for a key share one read. A single thread reads, in one session for all keys that were queued
    while it was busy: with one thread per key, each read would take ten times as long. Commits of this process are
    visible to all later requests. Errors are raised in the requests that waited for them, and are not cached. When
    there are more than `max_entries` keys, the oldest is dropped.

    Args:
        registry: the registry.
        read: reads the value of a key.
        max_entries: maximum number of keys.
        grace_seconds: for how long after its read a value is valid while the database is unavailable.
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
        #: When a read last failed because the database was unavailable; None: the last read succeeded.
        self._unavailable_since: float | None = None
        self._reads: dict[_K, _PendingRead[_V]] = {}
        self._queued: dict[_K, _PendingRead[_V]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def get(self, key: _K) -> _V:
        """Returns the value of a key, at most `TTL_SECONDS` old, or raises the error of its read.

        While the database is unavailable, the value is at most `grace_seconds` old.
        """
        known = self._cached_within_grace(key)
        if (
            known is not None
            and self._unavailable_since is not None
            and time.monotonic() - self._unavailable_since < TTL_SECONDS
        ):
            return known.value
        pending = self._queued.get(key)
        if pending is None:
            pending = self._reads.get(key)
            if pending is None or not self._is_fresh(pending):
                pending = self._enqueue(key)
        if known is None:
            # Shielded, since a request that is cancelled must not cancel the read for others.
            return await asyncio.shield(pending.future)
        try:
            # During an outage no request waits: the read in the background detects its end.
            async with asyncio.timeout(READ_TIMEOUT_SECONDS if self._unavailable_since is None else 0):
                return await asyncio.shield(pending.future)
        except TimeoutError:
            self._unavailable_since = time.monotonic()
        except Unavailable:
            pass
        return known.value

    def _cached_within_grace(self, key: _K) -> _CachedValue[_V] | None:
        known = self._cached.get(key)
        if (
            known is None
            or known.commit_token is not self._registry.commit_token
            or time.monotonic() - known.read_at >= self._grace_seconds
        ):
            return None
        return known

    def _is_fresh(self, pending: _PendingRead[_V]) -> bool:
        return (
            pending.commit_token is self._registry.commit_token and time.monotonic() - pending.started_at < TTL_SECONDS
        )

    def _enqueue(self, key: _K) -> _PendingRead[_V]:
        pending: _PendingRead[_V] = _PendingRead()
        self._reads.pop(key, None)
        self._reads[key] = self._queued[key] = pending
        if len(self._reads) > self._max_entries:
            del self._reads[next(iter(self._reads))]
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_queued())
        return pending

    async def _read_queued(self) -> None:
        """Reads until no key is queued."""
        while self._queued:
            now, self._queued = self._queued, {}
            for pending in now.values():
                pending.started_at, pending.commit_token = time.monotonic(), self._registry.commit_token
            try:
                answers = await run_in_threadpool(self._read_all, list(now))
                self._unavailable_since = None
            except Exception as error:  # noqa: BLE001 - the waiting requests raise it
                self._unavailable_since = time.monotonic() if isinstance(error, Unavailable) else None
                answers = dict.fromkeys(now, error)
            for key, pending in now.items():
                self._finish(key, pending, answers[key])

    def _read_all(self, keys: Sequence[_K]) -> Mapping[_K, _V | Exception]:
        with self._registry.reading() as session:
            return {key: self._read_one(session, key) for key in keys}

    def _read_one(self, session: Session, key: _K) -> _V | LoramillError:
        try:
            return self._read(session, key)
        except LoramillError as error:
            return error

    def _finish(self, key: _K, pending: _PendingRead[_V], answer: _V | Exception) -> None:
        if not isinstance(answer, Exception):
            pending.future.set_result(answer)
            self._store(key, _CachedValue(answer, pending.started_at, pending.commit_token))
            return
        if not isinstance(answer, Unavailable):
            self._cached.pop(key, None)  # the value no longer exists
        pending.future.set_exception(answer)
        pending.future.exception()  # no request may be waiting any more
        if self._reads.get(key) is pending:
            del self._reads[key]

    def _store(self, key: _K, known: _CachedValue[_V]) -> None:
        if not self._grace_seconds:
            return
        self._cached.pop(key, None)
        self._cached[key] = known
        if len(self._cached) > self._max_entries:
            del self._cached[next(iter(self._cached))]
