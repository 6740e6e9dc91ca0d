"""Autoscaling decisions: a table of cases, properties, and simulated days of requests."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
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

#: At the assumed speed of 500 tokens per second, a replica may have 2000 pending tokens.
TARGETS = ScalingTargets(pending_seconds=4, first_token_seconds=2, down_seconds=60, idle_seconds=300)
SLOW = ReplicaLoad(pending_tokens=500, tokens_per_second=400, first_token_seconds=3, running=4, waiting=2)


def observed(
    now: float = 0.0, target: int = 1, *running: ReplicaLoad, queued: float = 0, least: int = 1, most: int = 5
) -> ReplicaSet:
    return ReplicaSet(now, target, running or (ReplicaLoad(),) * target, queued, least, most)


def state(now: float, active: float = 0.0, changed: float = 0.0, sufficient: int = 1) -> PolicyState:
    return PolicyState(now, active, changed, None, ((now, sufficient),))


@pytest.mark.parametrize(
    ("seen", "previous", "replicas", "reason"),
    [
        (observed(), None, 1, Reason.STEADY),
        (observed(0, 1, ReplicaLoad(pending_tokens=2000, running=4)), None, 1, Reason.STEADY),
        (observed(0, 1, ReplicaLoad(pending_tokens=2001, running=4)), None, 2, Reason.PENDING_WORK),
        (observed(0, 1, ReplicaLoad(pending_tokens=49999, running=4)), None, 5, Reason.PENDING_WORK),
        # Queued requests count as the mean of the others: 10 requests of 500 tokens.
        (observed(0, 1, ReplicaLoad(pending_tokens=2000, running=4), queued=10), None, 4, Reason.PENDING_WORK),
        (observed(0, 0, queued=1, least=0), None, 1, Reason.PENDING_WORK),
        (observed(0, 0, queued=17, least=0), None, 3, Reason.PENDING_WORK),
        # A stopping replica without work must not leave a request queued for ever.
        (observed(0, 0, ReplicaLoad(running=1), queued=1, least=0), None, 1, Reason.PENDING_WORK),
        # Replicas that are starting are counted.
        (ReplicaSet(0, 3, (ReplicaLoad(pending_tokens=6000, running=4),), 0, 1, 5), None, 3, Reason.STEADY),
        (observed(100, 1, SLOW), state(99), 2, Reason.FIRST_TOKEN),
        (observed(100, 5, *[SLOW] * 5), state(99), 5, Reason.STEADY),
        (observed(100, 1, SLOW), state(99, changed=81), 1, Reason.STEADY),
        (observed(100, 2, SLOW), state(99), 2, Reason.STEADY),
        (observed(100, 1, ReplicaLoad(first_token_seconds=3, running=4)), state(99), 1, Reason.STEADY),
        (observed(100, 3), state(99, active=90), 1, Reason.OVERPROVISIONED),
        (observed(100, 3), state(99, active=90, sufficient=2), 2, Reason.OVERPROVISIONED),
        (observed(100, 3), state(99, active=90, changed=41), 3, Reason.STEADY),
        (observed(100, 3, least=2), state(99, active=90), 2, Reason.OVERPROVISIONED),
        (observed(299, 1, least=0), state(298), 1, Reason.STEADY),
        (observed(300, 1, least=0), state(299), 0, Reason.IDLE),
        (observed(300, 1, least=1), state(299), 1, Reason.STEADY),
        (observed(300, 0, least=0), state(299), 0, Reason.STEADY),
        (observed(0, 1, least=2), None, 2, Reason.BOUNDS),
        (observed(0, 5, most=3), None, 3, Reason.BOUNDS),
    ],
)
def test_a_decision(seen, previous, replicas, reason):
    decision = decide(seen, previous, TARGETS)
    assert (decision.replicas, decision.reason) == (replicas, reason)
    assert decision.state.last_change == (
        seen.now if replicas != seen.target_replicas else previous.last_change if previous else 0.0
    )


def test_the_speed_is_measured_at_overloaded_replicas():
    busy = ReplicaLoad(pending_tokens=5000, tokens_per_second=400, running=16)
    idle = ReplicaLoad(pending_tokens=10, tokens_per_second=20, running=1)
    previous = None
    for now in range(100):
        previous = decide(observed(now, 2, busy, idle), previous, TARGETS).state
    assert previous.tokens_per_second == pytest.approx(400, rel=0.01)
    stuck = ReplicaLoad(pending_tokens=5000, running=16)
    for other in (idle, stuck):
        assert (
            decide(observed(100, 2, idle, other), previous, TARGETS).state.tokens_per_second
            == previous.tokens_per_second
        )


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
def test_the_target_is_within_bounds_and_falls_only_after_a_while(observations, least, span):
    most = max(1, least + span)
    now, target, previous, changes = 0.0, least, None, []
    for seconds, running, queued in observations:
        now += seconds
        decision = decide(ReplicaSet(now, target, tuple(running), queued, least, most), previous, TARGETS)
        assert least <= decision.replicas <= most
        assert decision.replicas > 0 or not queued
        if decision.replicas != target:
            changes.append((now, target, decision.replicas))
        target, previous = decision.replicas, decision.state
    assert all(
        now - before >= TARGETS.down_seconds for (before, *_), (now, old, new) in pairwise(changes) if 0 < new < old
    )


HOUR = 3600.0


def wave(now: float) -> float:
    """Two days of half an hour each."""
    return 1 + 5 * (1 - math.cos(2 * math.pi * now / 1800))


@pytest.mark.parametrize("seed", range(2))
def test_replicas_follow_the_load_of_a_day(seed):
    requests = trace(seed, HOUR, wave)
    seen = play(requests, ScalingTargets(), least=1, most=8, seconds=HOUR)
    assert seen.late(0.5) < 1
    assert seen.late(0.99) < 6
    assert seen.replica_seconds < 1.5 * oracle(requests, 1, HOUR)
    # Up, down, up, down.
    assert seen.turns == 3


@pytest.mark.parametrize("seed", range(2))
def test_a_burst_scales_to_the_maximum_and_back(seed):
    requests = trace(seed, 1200, lambda now: 20.0 if 300 <= now < 420 else 0.5)
    seen = play(requests, ScalingTargets(), least=1, most=8, seconds=1200)
    (first, _), *_ = seen.changes
    assert 300 <= first < 305
    assert seen.most == 8
    assert seen.turns == 1
    (last, decision) = seen.changes[-1]
    assert decision.replicas == 1
    assert last < 420 + 2.5 * ScalingTargets().down_seconds
    # 14 seconds of work have piled up before the first new replica is up.
    after = [at for at, seconds in zip(seen.at, seen.firsts, strict=True) if seconds > 2]
    assert max(after) < 300 + 120
    assert seen.replica_seconds < 2 * oracle(requests, 1, 1200)


@pytest.mark.parametrize("seed", range(2))
def test_one_hot_tenant(seed):
    requests = trace(seed, 1200, lambda now: 1.0 + (10.0 if 200 <= now < 900 else 0.0))
    seen = play(requests, ScalingTargets(), least=1, most=6, seconds=1200)
    assert seen.turns == 1
    assert seen.late(0.9) < 1.5
    assert seen.replica_seconds < 2 * oracle(requests, 1, 1200)


@pytest.mark.parametrize("rate", [1, 2.5, 3.5, 5, 8, 12])
def test_a_constant_load_causes_no_oscillation(rate):
    requests = trace(0, 1800, lambda now: rate)
    seen = play(requests, ScalingTargets(), least=1, most=8, seconds=1800)
    # The initial estimate is corrected at most once.
    assert seen.turns <= 1
    assert seen.late(0.95) < 2
    settled = [at for at, _ in seen.changes if at > 900]
    assert len(settled) <= 1


@pytest.mark.parametrize("guess", [SPEED / 4, SPEED * 4])
def test_a_wrong_initial_speed_is_corrected(guess, monkeypatch):
    monkeypatch.setattr(policy, "INITIAL_TOKENS_PER_SECOND", guess)
    requests = trace(0, 1800, lambda now: 8.0)
    seen = play(requests, ScalingTargets(), least=1, most=8, seconds=1800)
    assert seen.turns <= 4
    assert seen.late(0.9) < 3


def test_the_first_speed_is_what_the_replicas_expect_of_their_device():
    fast = ReplicaLoad(pending_tokens=30000, running=4, expected_tokens_per_second=8000)
    first = decide(observed(0, 1, fast), None, TARGETS)
    assert (first.replicas, first.reason) == (1, Reason.STEADY)
    # Without replicas, the last report still counts.
    again = decide(observed(1, 0, queued=100, least=0), first.state, TARGETS)
    assert again.replicas == 1
    busy = replace(fast, pending_tokens=33000, tokens_per_second=2000)
    measured = decide(observed(100, 1, busy), first.state, TARGETS)
    assert measured.replicas == 5 and measured.state.tokens_per_second == pytest.approx(2000, rel=0.01)


def test_an_idle_base_scales_to_zero_and_back():
    requests = [request for request in trace(0, 1800, lambda now: 1.0) if request.at < 200 or request.at >= 1000]
    seen = play(requests, ScalingTargets(), least=0, most=4, seconds=1800)
    reasons = [decision.reason for _, decision in seen.changes]
    assert reasons.count(Reason.IDLE) == 1
    (down,) = [at for at, decision in seen.changes if decision.replicas == 0]
    (up, *_) = [at for at, _ in seen.changes if at > down]
    assert 200 + ScalingTargets().idle_seconds - 10 < down < 200 + ScalingTargets().idle_seconds + 10
    assert 0 <= up - min(request.at for request in requests if request.at >= 1000) <= 2 * fleet.TICK
    assert max(seen.firsts) < fleet.START + 5


def test_the_policy_in_serves_context():
    function = "loramill.serve.autoscaling.ray_policy:Policy"
    config_policy = {"policy_function": function, "policy_kwargs": {"pending_seconds": 0.8}}
    config = AutoscalingConfig(min_replicas=0, max_replicas=4, initial_replicas=1, policy=config_policy, **UNDELAYED)
    deployment = DeploymentID("engine", "loramill")
    one, two = (ReplicaID(name, deployment) for name in ("one", "two"))
    load = ReplicaLoad(pending_tokens=900, tokens_per_second=90, running=3, waiting=1)
    context = AutoscalingContext(
        deployment_id=deployment,
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
