"""A gateway's port: shared by gateways, refused if another program has it, and closed without cutting an answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from loramill.errors import PortTaken, Unavailable
from loramill.serve.transport.http_server import HttpServer, listening_socket

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def app(ticks: int) -> FastAPI:
    made = FastAPI()

    @made.get("/ticks")
    async def tick() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for _ in range(ticks):
                await asyncio.sleep(0.02)
                yield "tick\n"

        return StreamingResponse(lines())

    return made


def test_a_stream_outlives_the_drain_and_nothing_new_begins() -> None:
    async def work() -> None:
        port = free_port()
        listener = HttpServer(app(ticks=20), HOST, port, drain_seconds=30)
        with pytest.raises(Unavailable):
            listener.check()
        await listener.start()
        url = f"http://{HOST}:{port}/ticks"
        async with httpx.AsyncClient(trust_env=False) as client, client.stream("GET", url) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            draining = asyncio.create_task(listener.drain())
            await asyncio.sleep(0.1)
            with pytest.raises(httpx.ConnectError):
                await httpx.AsyncClient(trust_env=False).get(url)
            assert [line async for line in lines] == ["tick"] * 19
        await draining
        with pytest.raises(Unavailable):
            listener.check()

    asyncio.run(asyncio.wait_for(work(), 30))


def test_two_servers_share_a_port_and_one_may_stop() -> None:
    async def work() -> None:
        port = free_port()
        first, second = (HttpServer(app(ticks=1), HOST, port, drain_seconds=5) for _ in range(2))
        await first.start()
        await second.start()
        await first.drain()
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(5):
                assert (await client.get(f"http://{HOST}:{port}/ticks")).text == "tick\n"
        await second.drain()

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"{HOST}:{port} is not available"):
            listening_socket(HOST, port)
