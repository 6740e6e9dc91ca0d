"""What a replica sends reaches the calling gateway, or the gateway gets an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from loramill.errors import Unavailable
from loramill.serve.protocol import SampledToken, TextChunk, TokenText
from loramill.serve.transport import channel
from loramill.serve.transport.channel import Address, Receiver, ReplicaLost, Sender

HOST = "127.0.0.1"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Receiver, Sender, Address]]:
    receiver, sender = Receiver(), Sender()
    yield receiver, sender, await receiver.address(HOST)
    await sender.close()
    await receiver.close()


def chunk(text: str, count: int, finish: str | None = None) -> TextChunk:
    return TextChunk(text, 3, count, finish)


def test_chunks_arrive_whole_and_in_order() -> None:
    token = TokenText("é", -0.25, "é".encode())
    complete = TextChunk(
        "héllo", 7, 2, None, (SampledToken(token, (token, TokenText("<x>", None, None))), SampledToken(token))
    )

    async def work() -> None:
        async with joined() as (receiver, sender, address):
            send = await sender.connect(address)
            with receiver.inbox("a") as inbox, receiver.inbox("b") as other:
                for each in (None, complete, chunk("", 3, "stop")):
                    send("a", each)
                send("b", chunk("b", 1))
                assert [await inbox.get() for _ in range(3)] == [None, complete, chunk("", 3, "stop")]
                assert await other.get() == chunk("b", 1)

    run(work())


def test_chunks_that_are_ready_together_are_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []

    async def work() -> None:
        async with joined() as (receiver, sender, address):
            dispatch = receiver._dispatch
            monkeypatch.setattr(receiver, "_dispatch", lambda frame, _: (frames.append(frame), dispatch(frame, _)))
            send = await sender.connect(address)
            with receiver.inbox("31") as last:
                for n in range(32):
                    send(str(n), chunk("x", 1))
                await last.get()
                send("31", chunk("y", 2))
                await last.get()

    run(work())
    assert len(frames) == 2


def test_a_replica_that_ends_leaves_no_request_waiting() -> None:
    async def work() -> None:
        async with joined() as (receiver, sender, address):
            send = await sender.connect(address)
            with receiver.inbox("begun") as begun, receiver.inbox("done") as done, receiver.inbox("other") as other:
                send("begun", None)
                send("done", chunk("x", 1, "stop"))
                await sender.close()
                assert await begun.get() is None
                assert isinstance(await begun.get(), ReplicaLost)
                assert await done.get() == chunk("x", 1, "stop")
                await asyncio.sleep(0.05)
                assert done.empty() and other.empty()

    run(work())


def test_one_connection_serves_all_and_is_replaced_if_it_breaks() -> None:
    async def work() -> None:
        async with joined() as (receiver, sender, address):
            first, second = await asyncio.gather(sender.connect(address), sender.connect(address))
            assert first == second
            with receiver.inbox("a") as inbox:
                first("a", None)
                await inbox.get()
                assert len(receiver._connections) == 1
                for writer in list(receiver._connections):
                    writer.close()
                assert isinstance(await inbox.get(), ReplicaLost)
                while await sender.connect(address) == first:
                    await asyncio.sleep(0.01)
                (await sender.connect(address))("a", chunk("again", 1))
                assert await inbox.get() == chunk("again", 1)

    run(work())


def test_a_sender_without_the_secret_is_ignored() -> None:
    async def work() -> None:
        async with joined() as (receiver, sender, address):
            with receiver.inbox("a") as inbox:
                send = await Sender().connect(address._replace(secret="0" * 32))
                send("a", chunk("forged", 1))
                (await sender.connect(address))("a", chunk("true", 1))
                assert await inbox.get() == chunk("true", 1)
                await asyncio.sleep(0.05)
                assert inbox.empty()

    run(work())


def test_an_unreachable_gateway_is_an_error() -> None:
    async def work() -> None:
        async with joined() as (receiver, sender, address):
            await receiver.close()
            for _ in range(2):
                with pytest.raises(Unavailable, match=f"{HOST}:{address.port} is unreachable"):
                    await sender.connect(address)

    run(work())


def test_a_gateway_that_stops_reading_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_MAX_BUFFERED_BYTES", 1 << 20)

    async def work() -> None:
        reading = asyncio.Event()

        async def never(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reading.wait()
            writer.close()

        server = await asyncio.start_server(never, HOST, 0)
        sender = Sender()
        address = Address(HOST, server.sockets[0].getsockname()[1], "secret")
        send = await sender.connect(address)
        for _ in range(200):
            send("a", chunk("x" * 100_000, 1))
            await asyncio.sleep(0)
        assert await sender.connect(address) != send
        reading.set()
        server.close()

    run(work())
