"""Autoscaling decisions: a table of cases, properties, and simulated days of requests."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from loramill.serve.autoscaling import policy
from loramill.serve.autoscaling.policy import PolicyState, Reason, ReplicaLoad, ReplicaSet, ScalingTargets, decide
from loramill.serve.autoscaling.ray_policy import UNDELAYED, Policy, replica_set_of

from . import fleet
from .fleet import SPEED, oracle, play, trace

#: A replica, whose speed is assumed to be 500 tokens per second, may have 2000 pending tokens.
TARGETS = ScalingTargets(pending_seconds=4, first_token_seconds=2, down_seconds=60, idle_seconds=300)
SLOW = ReplicaLoad(pending_tokens=500, tokens_per_second=400, first_token_seconds=3, running=4, waiting=2)


def look(
    now: float = 0.0, wanted: int = 1, *up: ReplicaLoad, queued: float = 0, least: int = 1, most: int = 5
) -> ReplicaSet:
    return ReplicaSet(now, wanted, up or (ReplicaLoad(),) * wanted, queued, least, most)


def remembered(now: float, asked: float = 0.0, changed: float = 0.0, enough: int = 1) -> PolicyState:
    return PolicyState(now, asked, changed, None, ((now, enough),))


@pytest.mark.parametrize(
    ("seen", "memory", "replicas", "reason"),
    [
        (look(), None, 1, Reason.STEADY),
        (look(0, 1, ReplicaLoad(pending_tokens=2000, running=4)), None, 1, Reason.STEADY),
        (look(0, 1, ReplicaLoad(pending_tokens=2001, running=4)), None, 2, Reason.PENDING_WORK),
        (look(0, 1, ReplicaLoad(pending_tokens=49999, running=4)), None, 5, Reason.PENDING_WORK),
        # Queued requests count as the mean of the others: 10 requests of 500 tokens.
        (look(0, 1, ReplicaLoad(pending_tokens=2000, running=4), queued=10), None, 4, Reason.PENDING_WORK),
        (look(0, 0, queued=1, least=0), None, 1, Reason.PENDING_WORK),
        (look(0, 0, queued=17, least=0), None, 3, Reason.PENDING_WORK),
        # A replica that has computed all but does not stop yet leaves no request queued for ever.
        (look(0, 0, ReplicaLoad(running=1), queued=1, least=0), None, 1, Reason.PENDING_WORK),
        # Replicas that are starting count.
        (ReplicaSet(0, 3, (ReplicaLoad(pending_tokens=6000, running=4),), 0, 1, 5), None, 3, Reason.STEADY),
        (look(100, 1, SLOW), remembered(99), 2, Reason.FIRST_TOKEN),
        (look(100, 5, *[SLOW] * 5), remembered(99), 5, Reason.STEADY),
        (look(100, 1, SLOW), remembered(99, changed=81), 1, Reason.STEADY),
        (look(100, 2, SLOW), remembered(99), 2, Reason.STEADY),
        (look(100, 1, ReplicaLoad(first_token_seconds=3, running=4)), remembered(99), 1, Reason.STEADY),
        (look(100, 3), remembered(99, asked=90), 1, Reason.OVERPROVISIONED),
        (look(100, 3), remembered(99, asked=90, enough=2), 2, Reason.OVERPROVISIONED),
        (look(100, 3), remembered(99, asked=90, changed=41), 3, Reason.STEADY),
        (look(100, 3, least=2), remembered(99, asked=90), 2, Reason.OVERPROVISIONED),
        (look(299, 1, least=0), remembered(298), 1, Reason.STEADY),
        (look(300, 1, least=0), remembered(299), 0, Reason.IDLE),
        (look(300, 1, least=1), remembered(299), 1, Reason.STEADY),
        (look(300, 0, least=0), remembered(299), 0, Reason.STEADY),
        (look(0, 1, least=2), None, 2, Reason.BOUNDS),
        (look(0, 5, most=3), None, 3, Reason.BOUNDS),
    ],
)
def test_one_decision(seen, memory, replicas, reason):
    decision = decide(seen, memory, TARGETS)
    assert (decision.replicas, decision.reason) == (replicas, reason)
    assert decision.state.last_change == (
        seen.now if replicas != seen.target_replicas else memory.last_change if memory else 0.0
    )


def test_the_speed_is_measured_at_overloaded_replicas():
    busy = ReplicaLoad(pending_tokens=5000, tokens_per_second=400, running=16)
    idle = ReplicaLoad(pending_tokens=10, tokens_per_second=20, running=1)
    memory = None
    for now in range(100):
        memory = decide(look(now, 2, busy, idle), memory, TARGETS).state
    assert memory.tokens_per_second == pytest.approx(400, rel=0.01)
    stuck = ReplicaLoad(pending_tokens=5000, running=16)
    for other in (idle, stuck):
        assert decide(look(100, 2, idle, other), memory, TARGETS).state.tokens_per_second == memory.tokens_per_second


loads = st.builds(
    ReplicaLoad,
    st.floats(0, 1e5),
    st.floats(0, 1e4),
    st.floats(0, 60),
    st.integers(0, 64),
    st.integers(0, 64),
)


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.lists(loads, max_size=5), st.integers(0, 50)), max_size=20),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_within_bounds_and_down_only_after_a_while(looks, least, span):
    most = max(1, least + span)
    now, wanted, memory, changes = 0.0, least, None, []
    for seconds, up, queued in looks:
        now += seconds
        decision = decide(ReplicaSet(now, wanted, tuple(up), queued, least, most), memory, TARGETS)
        assert least <= decision.replicas <= most
        assert decision.replicas > 0 or not queued
        if decision.replicas != wanted:
            changes.append((now, wanted, decision.replicas))
        wanted, memory = decision.replicas, decision.state
    assert all(
        now - before >= TARGETS.down_seconds for (before, *_), (now, old, new) in pairwise(changes) if 0 < new < old
    )


HOUR = 3600.0


def wave(now: float) -> float:
    """Two days of half an hour each."""
    return 1 + 5 * (1 - math.cos(2 * math.pi * now / 1800))


@pytest.mark.parametrize("seed", range(2))
def test_a_day_is_followed_up_and_down(seed):
    asks = trace(seed, HOUR, wave)
    seen = play(asks, ScalingTargets(), least=1, most=8, seconds=HOUR)
    assert seen.late(0.5) < 1
    assert seen.late(0.99) < 6
    assert seen.replica_seconds < 1.5 * oracle(asks, 1, HOUR)
    # Up, down, up, down.
    assert seen.turns == 3


@pytest.mark.parametrize("seed", range(2))
def test_a_burst_scales_to_the_maximum_and_back(seed):
    asks = trace(seed, 1200, lambda now: 20.0 if 300 <= now < 420 else 0.5)
    seen = play(asks, ScalingTargets(), least=1, most=8, seconds=1200)
    (first, _), *_ = seen.changes
    assert 300 <= first < 305
    assert seen.most == 8
    assert seen.turns == 1
    (last, decision) = seen.changes[-1]
    assert decision.replicas == 1
    assert last < 420 + 2.5 * ScalingTargets().down_seconds
    # Work of 14 seconds has piled up before the first of them is up.
    after = [at for at, seconds in zip(seen.at, seen.firsts, strict=True) if seconds > 2]
    assert max(after) < 300 + 120
    assert seen.replica_seconds < 2 * oracle(asks, 1, 1200)


@pytest.mark.parametrize("seed", range(2))
def test_one_hot_tenant(seed):
    asks = trace(seed, 1200, lambda now: 1.0 + (10.0 if 200 <= now < 900 else 0.0))
    seen = play(asks, ScalingTargets(), least=1, most=6, seconds=1200)
    assert seen.turns == 1
    assert seen.late(0.9) < 1.5
    assert seen.replica_seconds < 2 * oracle(asks, 1, 1200)


@pytest.mark.parametrize("rate", [1, 2.5, 3.5, 5, 8, 12])
def test_a_constant_load_causes_no_oscillation(rate):
    asks = trace(0, 1800, lambda now: rate)
    seen = play(asks, ScalingTargets(), least=1, most=8, seconds=1800)
    # At most the first guess is corrected, once.
    assert seen.turns <= 1
    assert seen.late(0.95) < 2
    settled = [at for at, _ in seen.changes if at > 900]
    assert len(settled) <= 1


@pytest.mark.parametrize("guess", [SPEED / 4, SPEED * 4])
def test_a_wrong_guess_of_the_speed_is_corrected(guess, monkeypatch):
    monkeypatch.setattr(policy, "INITIAL_TOKENS_PER_SECOND", guess)
    asks = trace(0, 1800, lambda now: 8.0)
    seen = play(asks, ScalingTargets(), least=1, most=8, seconds=1800)
    assert seen.turns <= 4
    assert seen.late(0.9) < 3


def test_an_idle_base_scales_to_zero_and_back():
    asks = [ask for ask in trace(0, 1800, lambda now: 1.0) if ask.at < 200 or ask.at >= 1000]
    seen = play(asks, ScalingTargets(), least=0, most=4, seconds=1800)
    reasons = [decision.reason for _, decision in seen.changes]
    assert reasons.count(Reason.IDLE) == 1
    (asleep,) = [at for at, decision in seen.changes if decision.replicas == 0]
    (awake, *_) = [at for at, _ in seen.changes if at > asleep]
    assert 200 + ScalingTargets().idle_seconds - 10 < asleep < 200 + ScalingTargets().idle_seconds + 10
    assert 0 <= awake - min(ask.at for ask in asks if ask.at >= 1000) <= 2 * fleet.TICK
    assert max(seen.firsts) < fleet.START + 5


def test_the_policy_in_serves_context():
    function = "loramill.serve.autoscaling.ray_policy:Policy"
    config_policy = {"policy_function": function, "policy_kwargs": {"pending_seconds": 0.8}}
    config = AutoscalingConfig(min_replicas=0, max_replicas=4, initial_replicas=1, policy=config_policy, **UNDELAYED)
    here = DeploymentID("engine", "loramill")
    one, two = (ReplicaID(name, here) for name in ("one", "two"))
    load = ReplicaLoad(pending_tokens=900, tokens_per_second=90, running=3, waiting=1)
    context = AutoscalingContext(
        deployment_id=here,
        deployment_name="engine",
        app_name="loramill",
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=[one, two],
        total_num_requests=4.0,
        total_queued_requests=2.0,
        aggregated_metrics={},
        raw_metrics={
            name: {one: [TimeStampedValue(1.0, 7.0), TimeStampedValue(2.0, value)]}
            for name, value in asdict(load).items()
        },
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=5.0,
        config=config,
    )
    assert replica_set_of(context) == ReplicaSet(5.0, 2, (load, ReplicaLoad()), 2.0, 0, 4)
    made = config.policy.get_policy()(**config.policy.policy_kwargs)
    replicas, state = made(context)
    assert replicas == 4
    assert type(made).__name__ == Policy.__name__
    context.policy_state = state
    assert made(context)[0] == 4
