"""What a replica says of its health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from loramill.bases import Base
from loramill.errors import Unavailable
from loramill.serve.protocol import TextRequest
from loramill.serve.replica import Replica
from loramill.settings import ServeSettings


@pytest.fixture
def replica(hermes_base: Base) -> Iterator[Replica]:
    replica = Replica(hermes_base, lambda version: hermes_base.folder, ServeSettings(stuck_seconds=1.0))
    yield replica
    replica.close()


def test_an_idle_replica_is_well(replica: Replica) -> None:
    async def watch() -> None:
        for _ in range(4):
            await replica.ready()
            await asyncio.sleep(0.5)

    asyncio.run(watch())


def test_a_hung_engine_is_found_out(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    hung, go_on = threading.Event(), threading.Event()
    step = replica._engine.step

    def hang() -> object:
        hung.set()
        go_on.wait()
        return step()

    async def watch() -> None:
        answer = replica.generate(TextRequest("1", "acme", prompt="a", max_tokens=1))
        first = asyncio.ensure_future(anext(answer))
        await asyncio.to_thread(hung.wait)
        await replica.ready()
        await asyncio.sleep(1.2)
        with pytest.raises(Unavailable, match="has hung for 1 s"):
            await replica.ready()
        go_on.set()
        await first
        await answer.aclose()
        await replica.ready()

    monkeypatch.setattr(replica._engine, "step", hang)
    asyncio.run(asyncio.wait_for(watch(), 30))
