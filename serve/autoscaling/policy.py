"""How many engine replicas a base needs: a pure function of their pending work.

The number rises at once to what the pending work needs. It falls when fewer replicas have sufficed for a while, and to
zero when there has been no request for long. A replica's speed is measured while it has more work than its target:
only then does the number of tokens that it computes show its capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

#: Tokens per second, of prompts and answers, that a fully loaded replica computes: a guess until a replica reports
#: what to expect of its device, or its speed is measured.
INITIAL_TOKENS_PER_SECOND = 500.0
#: Time constant in seconds of the average over which the speed of a replica is measured.
SPEED_WINDOW_SECONDS = 10.0
#: Fraction of the replicas' speed in use above which their number does not fall.
MAX_UTILIZATION = 0.7
#: Seconds after a change until the time to first token reflects it.
SETTLE_SECONDS = 20.0
#: Tokens of a queued request, where there are no others to take the mean of.
DEFAULT_REQUEST_TOKENS = 256.0


@dataclass(frozen=True, slots=True)
class ScalingTargets:
    """What the policy aims at.

    Attributes:
        pending_seconds: queued work per replica above which the number rises.
        first_token_seconds: time to first token above which a replica with waiting requests is overloaded.
        down_seconds: time for which fewer replicas must have sufficed before the number falls.
        idle_seconds: time without requests after which the number falls to zero, where zero is allowed.
    """

    pending_seconds: float = 4.0
    first_token_seconds: float = 2.0
    down_seconds: float = 60.0
    idle_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """The load that a replica reports.

    Attributes:
        pending_tokens: tokens of prompts and answers to compute; for an answer, as many as are likely to remain.
        tokens_per_second: recently computed tokens of prompts and answers.
        first_token_seconds: mean time to first token recently; 0 without one.
        running: number of running requests.
        waiting: number of waiting requests.
        expected_tokens_per_second: speed under full load that the replica's device lets expect; 0: unknown.
    """

    pending_tokens: float = 0.0
    tokens_per_second: float = 0.0
    first_token_seconds: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    expected_tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """The replicas of a base.

    Attributes:
        now: seconds of any clock.
        target_replicas: the last decision; some of these replicas may not be running yet.
        loads: the loads of the running replicas.
        queued_requests: requests at the gateways that no replica has accepted.
        min_replicas, max_replicas: bounds of the decision.
    """

    now: float
    target_replicas: int
    loads: tuple[ReplicaLoad, ...]
    queued_requests: float
    min_replicas: int
    max_replicas: int


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a decision passes to the next one.

    Attributes:
        now: when it was made.
        last_active: when there was last a request.
        last_change: when the number of replicas last changed.
        tokens_per_second: measured speed of a fully loaded replica; None before the first measurement.
        sufficient: pairs of a time within the last `down_seconds` and the number of replicas that would have sufficed
            then. Numbers that a later one exceeds or equals are dropped, so the first pair has the highest number.
        expected_tokens_per_second: the speed until it is measured, as replicas last reported it; None: never.
    """

    now: float
    last_active: float
    last_change: float
    tokens_per_second: float | None = None
    sufficient: tuple[tuple[float, int], ...] = ()
    expected_tokens_per_second: float | None = None


class Reason(StrEnum):
    """Why there are to be this many replicas."""

    STEADY = "no change"
    BOUNDS = "outside of the bounds"
    PENDING_WORK = "pending work above target"
    FIRST_TOKEN = "time to first token above target"
    OVERPROVISIONED = "over-provisioned"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas there are to be, why, and the state for the next decision."""

    replicas: int
    reason: Reason
    state: PolicyState


def decide(replica_set: ReplicaSet, state: PolicyState | None, targets: ScalingTargets) -> ScalingDecision:
    """Decides how many replicas there are to be; `state` is the last decision's, None at first."""
    now = replica_set.now
    state = _observe(replica_set, state or PolicyState(now, now, now), targets)
    replicas, reason = _target_replicas(replica_set, state, targets)
    if replicas != replica_set.target_replicas:
        state = replace(state, last_change=now)
    return ScalingDecision(replicas, reason, state)


def _target_replicas(replica_set: ReplicaSet, state: PolicyState, targets: ScalingTargets) -> tuple[int, Reason]:
    target, now = replica_set.target_replicas, replica_set.now
    bounded = max(replica_set.min_replicas, min(replica_set.max_replicas, target))
    if bounded != target:
        return bounded, Reason.BOUNDS
    needed = math.ceil(pending_tokens(replica_set) / _tokens_per_replica(state, targets))
    needed = max(needed, 1) if replica_set.queued_requests else needed
    if (needed := min(replica_set.max_replicas, needed)) > target:
        return needed, Reason.PENDING_WORK
    settled = len(replica_set.loads) >= target and now - state.last_change >= SETTLE_SECONDS
    if target < replica_set.max_replicas and settled and any(_is_slow(load, targets) for load in replica_set.loads):
        return target + 1, Reason.FIRST_TOKEN
    if replica_set.min_replicas == 0 and now - state.last_active >= targets.idle_seconds:
        return 0, Reason.IDLE if target else Reason.STEADY
    sufficient = state.sufficient[0][1]
    if sufficient < target and now - state.last_change >= targets.down_seconds:
        return max(1, replica_set.min_replicas, sufficient), Reason.OVERPROVISIONED
    return target, Reason.STEADY


def pending_tokens(replica_set: ReplicaSet) -> float:
    """All tokens to compute; a queued request counts as the mean of the requests at the replicas."""
    tokens = sum(load.pending_tokens for load in replica_set.loads)
    requests = sum(load.running + load.waiting for load in replica_set.loads)
    return tokens + replica_set.queued_requests * (tokens / requests if requests else DEFAULT_REQUEST_TOKENS)


def _speed(state: PolicyState) -> float:
    return state.tokens_per_second or state.expected_tokens_per_second or INITIAL_TOKENS_PER_SECOND


def _tokens_per_replica(state: PolicyState, targets: ScalingTargets) -> float:
    return targets.pending_seconds * _speed(state)


def _is_slow(load: ReplicaLoad, targets: ScalingTargets) -> bool:
    # If nothing waits, a first token takes as long as its prompt does, and more replicas do not help.
    return load.waiting > 0 and load.first_token_seconds > targets.first_token_seconds


def _observe(replica_set: ReplicaSet, state: PolicyState, targets: ScalingTargets) -> PolicyState:
    now = replica_set.now
    if expected := [load.expected_tokens_per_second for load in replica_set.loads if load.expected_tokens_per_second]:
        state = replace(state, expected_tokens_per_second=sum(expected) / len(expected))
    state = replace(state, tokens_per_second=_measure_speed(replica_set, state, targets))
    active = replica_set.queued_requests > 0 or any(load.running or load.waiting for load in replica_set.loads)
    sufficient = _sufficient_replicas(replica_set, state, targets)
    since = now - targets.down_seconds
    higher = ((at, number) for at, number in state.sufficient if at > since and number > sufficient)
    return replace(
        state,
        now=now,
        last_active=now if active else state.last_active,
        sufficient=(*higher, (now, sufficient)),
    )


def _sufficient_replicas(replica_set: ReplicaSet, state: PolicyState, targets: ScalingTargets) -> int:
    """The number of replicas with half of their target work each, and at most `MAX_UTILIZATION` of their speed."""
    pending = pending_tokens(replica_set) / (_tokens_per_replica(state, targets) / 2)
    computed = sum(load.tokens_per_second for load in replica_set.loads) / (MAX_UTILIZATION * _speed(state))
    return max(1, math.ceil(pending), math.ceil(computed))


def _measure_speed(replica_set: ReplicaSet, state: PolicyState, targets: ScalingTargets) -> float | None:
    """Moves the speed of a fully loaded replica towards that of the replicas that are overloaded now."""
    full_tokens = _tokens_per_replica(state, targets)
    overloaded = (load for load in replica_set.loads if load.pending_tokens >= full_tokens or _is_slow(load, targets))
    # A replica that computes nothing hangs or has just started.
    speeds = [load.tokens_per_second for load in overloaded if load.tokens_per_second > 0]
    if not speeds:
        return state.tokens_per_second
    known, measured = _speed(state), sum(speeds) / len(speeds)
    return measured + (known - measured) * math.exp((state.now - replica_set.now) / SPEED_WINDOW_SECONDS)
