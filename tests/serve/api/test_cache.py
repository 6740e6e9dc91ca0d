"""The gateway's cache of the registry: how long entries are valid, how many are kept, and how they are read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from loramill.errors import Unauthenticated, Unavailable
from loramill.serve.api import cache
from loramill.serve.api.cache import TTL_SECONDS, ReadThroughCache


class FakeRegistry:
    """A registry with one word per key, which lists its reads and can block them."""

    def __init__(self) -> None:
        self.commit_token = object()
        self.word, self.reads, self.error, self.sessions = "old", [], None, 0
        self.open = threading.Event()
        self.open.set()

    @contextmanager
    def reading(self) -> Iterator[str]:
        """A session is the registry's word when it began."""
        self.sessions += 1
        yield self.word

    def read(self, session: str, key: str) -> str:
        self.reads.append(key)
        error = self.error
        self.open.wait(60)
        if error is not None:
            raise error
        return f"{key} {session}"


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def new_cache(registry: FakeRegistry, **options: Any) -> ReadThroughCache[str, str]:
    return ReadThroughCache(registry, registry.read, **options)  # type: ignore[arg-type]


def test_an_entry_is_valid_for_half_a_second(registry: FakeRegistry, clock: Callable[[float], None]) -> None:
    async def check() -> None:
        cached = new_cache(registry)
        assert await cached.get("a") == "a old"
        registry.word = "new"
        clock(TTL_SECONDS * 0.99)
        assert await cached.get("a") == "a old"
        assert await cached.get("b") == "b new"
        clock(TTL_SECONDS * 0.02)
        assert await cached.get("a") == "a new"
        assert registry.reads == ["a", "b", "a"]

    asyncio.run(check())


def test_a_commit_of_this_process_is_seen_at_once(registry: FakeRegistry) -> None:
    async def check() -> None:
        cached = new_cache(registry)
        assert await cached.get("a") == "a old"
        registry.word, registry.commit_token = "new", object()
        assert await cached.get("a") == "a new"

    asyncio.run(check())


def test_a_read_begun_before_a_commit_does_not_serve_later_callers(registry: FakeRegistry) -> None:
    async def check() -> None:
        cached = new_cache(registry)
        registry.open.clear()
        early = asyncio.create_task(cached.get("a"))
        while not registry.reads:
            await asyncio.sleep(0.001)
        registry.word, registry.commit_token = "new", object()
        late = asyncio.create_task(cached.get("a"))
        await asyncio.sleep(0)
        registry.open.set()
        assert (await early, await late) == ("a old", "a new")

    asyncio.run(check())


def test_concurrent_callers_share_a_read_that_survives_a_cancellation(registry: FakeRegistry) -> None:
    async def check() -> None:
        cached = new_cache(registry)
        registry.open.clear()
        tasks = [asyncio.create_task(cached.get("a")) for _ in range(20)]
        while not registry.reads:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.sleep(0)
        registry.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == ["a old"] * 19
        assert registry.reads == ["a"]

    asyncio.run(check())


def test_callers_during_a_read_share_the_next_session(registry: FakeRegistry) -> None:
    async def check() -> None:
        cached = new_cache(registry, max_entries=2)
        registry.open.clear()
        tasks = [asyncio.create_task(cached.get("a"))]
        while not registry.reads:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(cached.get(key)) for key in "bcdbe"]
        await asyncio.sleep(0)
        registry.open.set()
        assert await asyncio.gather(*tasks) == [f"{key} old" for key in "abcdbe"]
        assert registry.reads == list("abcde") and registry.sessions == 2

    asyncio.run(check())


def test_a_missing_key_fails_no_other(registry: FakeRegistry) -> None:
    def read(session: str, key: str) -> str:
        if key == "b":
            raise Unavailable("no b")
        return registry.read(session, key)

    async def check() -> None:
        cached: ReadThroughCache[str, str] = ReadThroughCache(registry, read)  # type: ignore[arg-type]
        answers = await asyncio.gather(*map(cached.get, "abc"), return_exceptions=True)
        assert answers[::2] == ["a old", "c old"] and str(answers[1]) == "no b"

    asyncio.run(check())


def test_an_unreadable_registry_is_an_error_for_all_who_wait(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise Unavailable("away")

    async def check() -> None:
        cached = new_cache(registry)
        monkeypatch.setattr(registry, "reading", away)
        assert [str(error) for error in await asyncio.gather(*map(cached.get, "ab"), return_exceptions=True)] == [
            "away",
            "away",
        ]
        monkeypatch.undo()
        assert await cached.get("a") == "a old"

    asyncio.run(check())


def test_errors_are_raised_and_not_cached(registry: FakeRegistry) -> None:
    async def check() -> None:
        cached = new_cache(registry)
        registry.error = Unavailable("away")
        for _ in range(2):
            with pytest.raises(Unavailable):
                await cached.get("a")
        registry.error = None
        assert await cached.get("a") == "a old"
        assert registry.reads == ["a"] * 3

    asyncio.run(check())


def test_expired_entries_are_not_served_without_the_registry(
    registry: FakeRegistry, clock: Callable[[float], None]
) -> None:
    async def check() -> None:
        cached = new_cache(registry)
        await cached.get("a")
        registry.error = Unavailable("away")
        assert await cached.get("a") == "a old"
        clock(TTL_SECONDS)
        with pytest.raises(Unavailable):
            await cached.get("a")

    asyncio.run(check())


def test_entries_stay_valid_without_the_registry_for_a_grace_period(
    registry: FakeRegistry, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise Unavailable("away")

    async def check() -> None:
        cached = new_cache(registry, grace_seconds=60.0)
        await cached.get("a")
        monkeypatch.setattr(registry, "reading", away)
        for _ in range(3):
            clock(19.9)
            assert await cached.get("a") == "a old"
        with pytest.raises(Unavailable):
            await cached.get("b")
        clock(0.4)
        with pytest.raises(Unavailable):
            await cached.get("a")
        monkeypatch.setattr(registry, "reading", FakeRegistry.reading.__get__(registry))
        registry.word = "new"
        clock(TTL_SECONDS)
        assert await cached.get("a") == "a new"

    asyncio.run(check())


def test_grace_does_not_outlast_own_changes_or_deletions(
    registry: FakeRegistry, clock: Callable[[float], None]
) -> None:
    async def check() -> None:
        cached = new_cache(registry, grace_seconds=60.0)
        await cached.get("a")
        registry.commit_token, registry.error = object(), Unavailable("away")
        with pytest.raises(Unavailable):
            await cached.get("a")
        registry.error = None
        assert await cached.get("a") == "a old"
        clock(TTL_SECONDS)
        registry.error = Unauthenticated("revoked")
        with pytest.raises(Unauthenticated):
            await cached.get("a")
        registry.error = Unavailable("away")
        with pytest.raises(Unavailable):
            await cached.get("a")

    asyncio.run(check())


def test_a_silent_database_is_waited_for_once(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        cached = new_cache(registry, grace_seconds=60.0)
        await cached.get("a")
        monkeypatch.setattr(cache, "READ_TIMEOUT_SECONDS", 0.05)
        monkeypatch.setattr(cache, "TTL_SECONDS", 0.0)
        registry.open.clear()
        waits = []
        for _ in range(5):
            began = asyncio.get_running_loop().time()
            assert await cached.get("a") == "a old"
            waits.append(asyncio.get_running_loop().time() - began >= 0.05)
        assert waits[0] and not all(waits[1:])
        registry.open.set()
        while cached._reader is not None and not cached._reader.done():
            await asyncio.sleep(0.001)
        registry.word = "new"
        assert await cached.get("a") == "a new"

    asyncio.run(check())


def test_a_bounded_number_of_entries_is_kept_the_newest(registry: FakeRegistry) -> None:
    async def check() -> None:
        cached = new_cache(registry, max_entries=3)
        for key in "abcdbe":
            await cached.get(key)
        assert registry.reads == list("abcde")
        for key in "deb":
            await cached.get(key)
        assert registry.reads == [*"abcdeb"]

    asyncio.run(check())
