"""The health of a replica."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from loramill.errors import Unavailable
from loramill.models.catalog import Base
from loramill.serve.protocol import TextRequest
from loramill.serve.replica.replica import Replica
from loramill.serve.sampling_params import SamplingParams
from loramill.settings import ServeSettings


@pytest.fixture
def replica(hermes_base: Base) -> Iterator[Replica]:
    replica = Replica(hermes_base, lambda version: hermes_base.folder, ServeSettings(stuck_seconds=60.0))
    yield replica
    replica.close()


def test_an_idle_replica_is_healthy(replica: Replica) -> None:
    async def watch() -> None:
        replica._last_step -= 120.0  # as if the engine had been silent for two minutes; an idle one steps again
        while time.monotonic() - replica._last_step > 60.0:
            await asyncio.sleep(0.01)
        await replica.ready()

    asyncio.run(asyncio.wait_for(watch(), 30))


def test_a_hung_engine_is_detected(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    hung, go_on = threading.Event(), threading.Event()
    step = replica._engine.step

    def hang() -> object:
        hung.set()
        go_on.wait()
        return step()

    async def watch() -> None:
        answer = replica.generate(TextRequest("1", "acme", prompt="a", sampling_params=SamplingParams(max_tokens=1)))
        first = asyncio.ensure_future(anext(answer))
        await asyncio.to_thread(hung.wait)
        try:
            await replica.ready()
            replica._last_step -= 120.0  # two minutes pass, and the step has not ended
            with pytest.raises(Unavailable, match=r"has hung for 1\d\d s"):
                await replica.ready()
        finally:
            go_on.set()  # else closing the replica would wait for the step
        await first
        await answer.aclose()
        await replica.ready()

    monkeypatch.setattr(replica._engine, "step", hang)
    asyncio.run(asyncio.wait_for(watch(), 30))
