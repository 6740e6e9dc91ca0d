"""A simulated flood by one tenant: the scheduler's own decisions, and step times as on a CPU."""

import random
from dataclasses import dataclass

import pytest

from loramill.serve.engine import EngineConfig
from loramill.serve.engine.scheduling.scheduler import Scheduler
from loramill.serve.engine.scheduling.sequence import RunningSequence

#: Seconds of a step: reading the weights, and each row's products.
FIXED, ROW = 0.006, 0.0006
SECONDS = 40.0


@dataclass(frozen=True)
class Arrival:
    at: float
    tenant: str
    prompt: int
    answer: int


def quiet(seed: int) -> list[Arrival]:
    """Three tenants that together send one request per second."""
    rng, arrivals = random.Random(seed), []
    for tenant in ("a", "b", "c"):
        at = rng.expovariate(1 / 3)
        while at < SECONDS:
            arrivals.append(Arrival(at, tenant, rng.randint(32, 256), rng.randint(16, 64)))
            at += rng.expovariate(1 / 3)
    return arrivals


def flood(seed: int, tenant: str) -> list[Arrival]:
    """A hundred requests at once, then fifty per second: several times what the machine can do."""
    rng = random.Random(seed)
    return [Arrival(max(0, i - 100) / 50, tenant, rng.randint(64, 600), rng.randint(20, 200)) for i in range(2000)]


def first_tokens(arrivals: list[Arrival]) -> dict[Arrival, float]:
    """Seconds to the first token, for the requests of the tenants a, b and c."""
    c = EngineConfig()
    s = Scheduler(c.kv_tokens // c.block_size, c.block_size, c.max_batch_tokens, c.max_sequences)
    coming = sorted(arrivals, key=lambda arrival: -arrival.at)
    arrived: dict[int, Arrival] = {}
    left: dict[int, int] = {}
    waited: dict[Arrival, float] = {}
    now = 0.0
    while any(arrival.tenant in "abc" for arrival in [*coming, *(arrived[number] for number in left)]):
        while coming and coming[-1].at <= now:
            arrival, number = coming.pop(), len(arrived)
            arrived[number], left[number] = arrival, arrival.answer
            s.add(RunningSequence(number, arrival.tenant, None, [number * 1000 + i for i in range(arrival.prompt)]))
        plan = s.schedule(lambda version: True)
        if not plan.chunks:
            now = coming[-1].at
            continue
        now += FIXED + ROW * sum(chunk.count for chunk in plan.chunks)
        s.commit(plan)
        for chunk in plan.chunks:
            if chunk.sampled:
                if arrived[chunk.id].tenant in "abc":
                    waited.setdefault(arrived[chunk.id], now - arrived[chunk.id].at)
                left[chunk.id] -= 1
                s.get(chunk.id).tokens.append(0)
                if not left[chunk.id]:
                    del left[chunk.id]
                    s.remove(chunk.id)
    return waited


def p95(waited: dict[Arrival, float]) -> float:
    return sorted(waited.values())[int(len(waited) * 0.95)]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_flood_at_most_doubles_the_others_time_to_first_token(seed):
    alone = first_tokens(quiet(seed))
    flooded = first_tokens([*quiet(seed), *flood(seed, "flood")])
    assert flooded.keys() == alone.keys()
    assert len(alone) > 25
    assert p95(flooded) <= 2 * p95(alone)


def test_a_flooding_tenant_waits_behind_its_own_requests():
    # The same flood, by one of the three tenants.
    alone = first_tokens(quiet(1))
    flooded = first_tokens([*quiet(1), *flood(1, "a")])
    own = {arrival: seconds for arrival, seconds in flooded.items() if arrival in alone and arrival.tenant == "a"}
    assert p95(own) > 10 * p95(alone)
