"""What is remembered of the record: how long, how much, and by whom it is read."""

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


class Record:
    """A record of one word a key, which counts its readers and may hold them up."""

    def __init__(self) -> None:
        self.commit_token = object()
        self.word, self.reads, self.error, self.sessions = "old", [], None, 0
        self.open = threading.Event()
        self.open.set()

    @contextmanager
    def reading(self) -> Iterator[str]:
        """A session is what the record said when it began."""
        self.sessions += 1
        yield self.word

    def read(self, session: str, key: str) -> str:
        self.reads.append(key)
        error = self.error
        self.open.wait(5)
        if error is not None:
            raise error
        return f"{key} {session}"


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])

    def go(seconds: float) -> None:
        now[0] += seconds

    return go


def view(record: Record, **options: Any) -> ReadThroughCache[str, str]:
    return ReadThroughCache(record, record.read, **options)  # type: ignore[arg-type]


def test_an_answer_holds_for_half_a_second(record: Record, clock: Callable[[float], None]) -> None:
    async def ask() -> None:
        known = view(record)
        assert await known.get("a") == "a old"
        record.word = "new"
        clock(TTL_SECONDS * 0.99)
        assert await known.get("a") == "a old"
        assert await known.get("b") == "b new"
        clock(TTL_SECONDS * 0.02)
        assert await known.get("a") == "a new"
        assert record.reads == ["a", "b", "a"]

    asyncio.run(ask())


def test_what_this_process_commits_is_seen_at_once(record: Record) -> None:
    async def ask() -> None:
        known = view(record)
        assert await known.get("a") == "a old"
        record.word, record.commit_token = "new", object()
        assert await known.get("a") == "a new"

    asyncio.run(ask())


def test_a_read_that_began_before_a_commit_does_not_answer_who_asks_after_it(record: Record) -> None:
    async def ask() -> None:
        known = view(record)
        record.open.clear()
        early = asyncio.create_task(known.get("a"))
        while not record.reads:
            await asyncio.sleep(0.001)
        record.word, record.commit_token = "new", object()
        late = asyncio.create_task(known.get("a"))
        await asyncio.sleep(0)
        record.open.set()
        assert (await early, await late) == ("a old", "a new")

    asyncio.run(ask())


def test_many_at_once_are_one_read_and_one_who_leaves_ends_it_for_nobody(record: Record) -> None:
    async def ask() -> None:
        known = view(record)
        record.open.clear()
        tasks = [asyncio.create_task(known.get("a")) for _ in range(20)]
        while not record.reads:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.sleep(0)
        record.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == ["a old"] * 19
        assert record.reads == ["a"]

    asyncio.run(ask())


def test_who_comes_while_a_read_is_under_way_shares_the_next_session(record: Record) -> None:
    async def ask() -> None:
        known = view(record, max_entries=2)
        record.open.clear()
        tasks = [asyncio.create_task(known.get("a"))]
        while not record.reads:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(known.get(key)) for key in "bcdbe"]
        await asyncio.sleep(0)
        record.open.set()
        assert await asyncio.gather(*tasks) == [f"{key} old" for key in "abcdbe"]
        assert record.reads == list("abcde") and record.sessions == 2

    asyncio.run(ask())


def test_one_key_that_is_not_there_spoils_no_other(record: Record) -> None:
    def read(session: str, key: str) -> str:
        if key == "b":
            raise Unavailable("no b")
        return record.read(session, key)

    async def ask() -> None:
        known: ReadThroughCache[str, str] = ReadThroughCache(record, read)  # type: ignore[arg-type]
        answers = await asyncio.gather(*map(known.get, "abc"), return_exceptions=True)
        assert answers[::2] == ["a old", "c old"] and str(answers[1]) == "no b"

    asyncio.run(ask())


def test_a_record_that_cannot_be_read_is_told_to_all_who_wait(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> Any:
        raise Unavailable("away")

    async def ask() -> None:
        known = view(record)
        monkeypatch.setattr(record, "reading", away)
        assert [str(error) for error in await asyncio.gather(*map(known.get, "ab"), return_exceptions=True)] == [
            "away",
            "away",
        ]
        monkeypatch.undo()
        assert await known.get("a") == "a old"

    asyncio.run(ask())


def test_errors_are_told_and_not_remembered(record: Record) -> None:
    async def ask() -> None:
        known = view(record)
        record.error = Unavailable("away")
        for _ in range(2):
            with pytest.raises(Unavailable):
                await known.get("a")
        record.error = None
        assert await known.get("a") == "a old"
        assert record.reads == ["a"] * 3

    asyncio.run(ask())


def test_what_is_old_is_not_told_when_the_record_is_away(record: Record, clock: Callable[[float], None]) -> None:
    async def ask() -> None:
        known = view(record)
        await known.get("a")
        record.error = Unavailable("away")
        assert await known.get("a") == "a old"
        clock(TTL_SECONDS)
        with pytest.raises(Unavailable):
            await known.get("a")

    asyncio.run(ask())


def test_known_answers_stay_valid_during_an_outage_for_a_grace(
    record: Record, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise Unavailable("away")

    async def ask() -> None:
        known = view(record, grace_seconds=60.0)
        await known.get("a")
        monkeypatch.setattr(record, "reading", away)
        for _ in range(3):
            clock(19.9)
            assert await known.get("a") == "a old"
        with pytest.raises(Unavailable):
            await known.get("b")
        clock(0.4)
        with pytest.raises(Unavailable):
            await known.get("a")
        monkeypatch.setattr(record, "reading", Record.reading.__get__(record))
        record.word = "new"
        clock(TTL_SECONDS)
        assert await known.get("a") == "a new"

    asyncio.run(ask())


def test_grace_does_not_outlast_own_changes_or_deletions(record: Record, clock: Callable[[float], None]) -> None:
    async def ask() -> None:
        known = view(record, grace_seconds=60.0)
        await known.get("a")
        record.commit_token, record.error = object(), Unavailable("away")
        with pytest.raises(Unavailable):
            await known.get("a")
        record.error = None
        assert await known.get("a") == "a old"
        clock(TTL_SECONDS)
        record.error = Unauthenticated("revoked")
        with pytest.raises(Unauthenticated):
            await known.get("a")
        record.error = Unavailable("away")
        with pytest.raises(Unavailable):
            await known.get("a")

    asyncio.run(ask())


def test_a_silent_database_is_waited_for_once(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        known = view(record, grace_seconds=60.0)
        await known.get("a")
        monkeypatch.setattr(cache, "READ_TIMEOUT_SECONDS", 0.05)
        monkeypatch.setattr(cache, "TTL_SECONDS", 0.0)
        record.open.clear()
        waits = []
        for _ in range(5):
            began = asyncio.get_running_loop().time()
            assert await known.get("a") == "a old"
            waits.append(asyncio.get_running_loop().time() - began >= 0.05)
        assert waits[0] and not all(waits[1:])
        record.open.set()
        while known._reader is not None and not known._reader.done():
            await asyncio.sleep(0.001)
        record.word = "new"
        assert await known.get("a") == "a new"

    asyncio.run(ask())


def test_a_bounded_number_is_remembered_the_newest(record: Record) -> None:
    async def ask() -> None:
        known = view(record, max_entries=3)
        for key in "abcdbe":
            await known.get(key)
        assert record.reads == list("abcde")
        for key in "deb":
            await known.get(key)
        assert record.reads == [*"abcdeb"]

    asyncio.run(ask())
