"""The router inside Ray Serve, in front of replicas that only pretend to load adapters."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from loramill.serve.protocol import TextRequest
from loramill.serve.routing.policy import report_stats

from ...ray_cluster import ray_cluster

SLOTS = 8
LOAD_SECONDS = 0.05


class FakeReplica:
    """A replica whose adapters are names and which evicts the least recently used one."""

    def __init__(self) -> None:
        self._slots: OrderedDict[str, None] = OrderedDict()
        self._requests = 0
        self._loads = 0

    async def answer(self, request: TextRequest, seconds: float) -> tuple[int, int]:
        """Returns this process's pid and how many adapters it has loaded."""
        self._requests += 1
        if request.version is not None and request.version not in self._slots:
            self._loads += 1
            self._slots[request.version] = None
            if len(self._slots) > SLOTS:
                self._slots.popitem(last=False)
            await asyncio.sleep(LOAD_SECONDS)
        if request.version in self._slots:
            self._slots.move_to_end(request.version)
        await asyncio.sleep(seconds)
        self._requests -= 1
        return os.getpid(), self._loads

    def record_routing_stats(self) -> dict[str, Any]:
        return report_stats(self._slots, slots=SLOTS, requests=self._requests)


class Gateway:
    """Requests three answers at once within one call; Serve gives all of them the id of the call."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    async def three(self) -> int:
        calls = [self._engine.answer.remote(TextRequest(f"r{number}", "acme"), 0.1) for number in range(3)]
        return len(await asyncio.gather(*calls))


@pytest.fixture(scope="module")
def gateway() -> Iterator[DeploymentHandle]:
    with ray_cluster(num_cpus=4):
        serve.start(proxy_location="Disabled")
        yield run_application()
        serve.shutdown()


def run_application() -> DeploymentHandle:
    engine = serve.deployment(
        FakeReplica,
        num_replicas=3,
        max_ongoing_requests=64,
        health_check_period_s=0.5,
        request_router_config={
            "request_router_class": "loramill.serve.routing.ray_router.AdapterRouter",
            "request_routing_stats_period_s": 0.5,
        },
        ray_actor_options={"num_cpus": 0.1},
    )
    front = serve.deployment(Gateway, ray_actor_options={"num_cpus": 0.1})
    return serve.run(front.bind(engine.bind()), name="app", route_prefix=None)


@pytest.fixture
def answer(gateway: DeploymentHandle) -> Callable[..., Awaitable[tuple[int, int]]]:
    handle = serve.get_deployment_handle("FakeReplica", "app")

    async def answer(version: str | None, seconds: float = 0.02) -> tuple[int, int]:
        return await handle.answer.remote(TextRequest("r", "acme", version), seconds)

    return answer


def test_all_requests_of_one_call_are_answered(gateway):
    assert gateway.three.remote().result(timeout_s=20) == 3


async def pids(answer, versions: list[str]) -> dict[str, int]:
    """Sends a request for each version, four at a time; returns the pids of the processes that answered."""
    found = {}
    for start in range(0, len(versions), 4):
        group = versions[start : start + 4]
        found |= dict(zip(group, [pid for pid, _ in await asyncio.gather(*map(answer, group))], strict=True))
    return found


def test_adapters_stay_where_they_are_until_their_replica_dies(answer):
    versions = [f"v{number}" for number in range(24)]

    async def story() -> None:
        first = await pids(answer, versions)
        assert len(set(first.values())) == 3
        await asyncio.sleep(1.5)  # for the reports of the replicas, which a busy machine delays
        deadline = time.monotonic() + 60
        rounds = [first]
        while any(each != rounds[0] for each in rounds) or len(rounds) < 4:
            assert time.monotonic() < deadline
            rounds = [await pids(answer, versions) for _ in range(4)]
        loads = dict([await answer(version) for version in versions])
        assert sum(loads.values()) <= 1.25 * len(versions)
        victim = Counter(rounds[0].values()).most_common(1)[0][0]
        os.kill(victim, signal.SIGKILL)
        # Adapters of the dead replica would evict these: 24 in 16 slots. So they come first, on their own.
        kept = {version: pid for version, pid in rounds[0].items() if pid != victim}
        assert await pids(answer, list(kept)) == kept
        deadline = time.monotonic() + 60
        while True:
            try:
                moved = await pids(answer, [version for version in versions if version not in kept])
                break
            except ray.exceptions.RayActorError:
                assert time.monotonic() < deadline
        assert set(moved.values()) <= set(kept.values())

    asyncio.run(asyncio.wait_for(story(), 240))


def test_a_hot_adapter_spreads(answer):
    found: set[int] = set()

    async def stream(deadline: float) -> None:
        while len(found) < 2 and time.monotonic() < deadline:
            pid, _ = await answer("hot", seconds=0.5)
            found.add(pid)

    async def story() -> None:
        await asyncio.gather(*(stream(time.monotonic() + 60) for _ in range(32)))

    asyncio.run(story())
    assert len(found) >= 2
