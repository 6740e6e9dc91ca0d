"""How many engine replicas a base needs: a pure decision from what they have before them.

More come at once, as many as the pending work asks for. Fewer come when fewer have been enough for a while, and none
when nobody has asked for long. How fast a replica is, is learned while it has more to do than it should: only then do
the tokens that it computes tell what it can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

#: Seconds over which the speed of a replica is learned.
_SPEED_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ScalingTargets:
    """What the policy aims at.

    Attributes:
        pending_seconds: of work that a replica may have before it.
        speed: tokens a second, prompts' and answers', that a replica computes when it is full; a guess that holds until
            it has been seen.
        first_token_seconds: to the first token, beyond which a replica with requests that wait has too much to do.
        usage: of the replicas' speed, what is used at most when there are to be fewer.
        settle_seconds: after a change until the time to the first token tells of it.
        down_seconds: for which fewer must have been enough.
        idle_seconds: without a request until there are none, where there may be none.
        request_tokens: of a request that no replica has yet, where the others' aren't known either.
    """

    pending_seconds: float = 4.0
    tokens_per_second: float = 500.0
    first_token_seconds: float = 2.0
    max_utilization: float = 0.7
    settle_seconds: float = 20.0
    down_seconds: float = 60.0
    idle_seconds: float = 300.0
    request_tokens: float = 256.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica says of itself.

    Attributes:
        pending_tokens: of prompts and answers, not computed yet; of an answer, what is likely still to come.
        tokens_per_second: computed lately, prompts' and answers'.
        first_token_seconds: to the first token lately; 0 if there was none.
        running: requests that are computed.
        waiting: requests that are not, for want of room.
    """

    pending_tokens: float = 0.0
    tokens_per_second: float = 0.0
    first_token_seconds: float = 0.0
    running: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """A base's replicas now.

    Attributes:
        now: seconds of any clock.
        wanted: replicas that were last decided on; some of them may not be up yet.
        up: the load of those that are.
        queued: requests at the gateways that no replica has taken.
        least, most: replicas that there may be.
    """

    now: float
    target_replicas: int
    loads: tuple[ReplicaLoad, ...]
    queued_requests: float
    min_replicas: int
    max_replicas: int


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a decision leaves for the next one.

    Attributes:
        now: when it was made.
        speed: of a full replica, as far as it was seen.
        asked: when there was last something to do.
        changed: when the number of replicas last changed.
        enough: when how many would have been enough, of the last `down_seconds`. Only those are kept after which no
            more were needed, so that the first is the highest.
    """

    now: float
    last_active: float
    last_change: float
    tokens_per_second: float | None = None
    sufficient: tuple[tuple[float, int], ...] = ()


class Reason(StrEnum):
    """Why there are to be so many replicas."""

    STEADY = "as before"
    BOUNDS = "the bounds have changed"
    PENDING_WORK = "the pending work asks for it"
    FIRST_TOKEN = "first tokens take too long"
    OVERPROVISIONED = "fewer have been enough"
    IDLE = "nobody asks"


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas there are to be, why, and what the next decision needs to know."""

    replicas: int
    reason: Reason
    state: PolicyState


def decide(replica_set: ReplicaSet, state: PolicyState | None, targets: ScalingTargets) -> ScalingDecision:
    """How many replicas there are to be from now on; `memory` is the last decision's."""
    state = _observe(replica_set, state or PolicyState(replica_set.now, replica_set.now, replica_set.now), targets)
    replicas, reason = _target_replicas(replica_set, state, targets)
    if replicas != replica_set.target_replicas:
        state = replace(state, last_change=replica_set.now)
    return ScalingDecision(replicas, reason, state)


def _target_replicas(fleet: ReplicaSet, memory: PolicyState, targets: ScalingTargets) -> tuple[int, Reason]:
    bounded = max(fleet.min_replicas, min(fleet.max_replicas, fleet.target_replicas))
    if bounded != fleet.target_replicas:
        return bounded, Reason.BOUNDS
    pending = pending_tokens(fleet, targets)
    room = targets.pending_seconds * (memory.tokens_per_second or targets.tokens_per_second)
    if (work := min(fleet.max_replicas, math.ceil(pending / room))) > fleet.target_replicas:
        return work, Reason.PENDING_WORK
    settled = len(fleet.loads) >= fleet.target_replicas and fleet.now - memory.last_change >= targets.settle_seconds
    if fleet.target_replicas < fleet.max_replicas and settled and any(_is_slow(load, targets) for load in fleet.loads):
        return fleet.target_replicas + 1, Reason.FIRST_TOKEN
    if fleet.min_replicas == 0 and fleet.now - memory.last_active >= targets.idle_seconds:
        return 0, Reason.IDLE if fleet.target_replicas else Reason.STEADY
    enough = memory.sufficient[0][1]
    if enough < fleet.target_replicas and fleet.now - memory.last_change >= targets.down_seconds:
        return max(1, fleet.min_replicas, enough), Reason.OVERPROVISIONED
    return fleet.target_replicas, Reason.STEADY


def pending_tokens(fleet: ReplicaSet, targets: ScalingTargets) -> float:
    """All that is to be computed; requests that no replica has yet count as much as the others do on average."""
    tokens = sum(load.pending_tokens for load in fleet.loads)
    requests = sum(load.running + load.waiting for load in fleet.loads)
    return tokens + fleet.queued_requests * (tokens / requests if requests else targets.request_tokens)


def _is_slow(load: ReplicaLoad, targets: ScalingTargets) -> bool:
    # Where nothing waits, a first token takes as long as its prompt does, and more replicas don't help.
    return load.waiting > 0 and load.first_token_seconds > targets.first_token_seconds


def _observe(fleet: ReplicaSet, memory: PolicyState, targets: ScalingTargets) -> PolicyState:
    speed = _estimate_speed(fleet, memory, targets)
    asked = fleet.queued_requests > 0 or any(load.running or load.waiting for load in fleet.loads)
    enough = _sufficient_replicas(fleet, speed or targets.tokens_per_second, targets)
    since = fleet.now - targets.down_seconds
    kept = ((at, number) for at, number in memory.sufficient if at > since and number > enough)
    return PolicyState(
        now=fleet.now,
        last_active=fleet.now if asked else memory.last_active,
        last_change=memory.last_change,
        tokens_per_second=speed,
        sufficient=(*kept, (fleet.now, enough)),
    )


def _sufficient_replicas(fleet: ReplicaSet, speed: float, targets: ScalingTargets) -> int:
    """Replicas that would do with half of the work that each may have before it, and with the speed that is used."""
    pending = pending_tokens(fleet, targets) / (targets.pending_seconds * speed / 2)
    computed = sum(load.tokens_per_second for load in fleet.loads) / (targets.max_utilization * speed)
    return max(1, math.ceil(pending), math.ceil(computed))


def _estimate_speed(fleet: ReplicaSet, memory: PolicyState, targets: ScalingTargets) -> float | None:
    """The speed of a full replica, a little nearer to that of those that have too much to do now."""
    room = targets.pending_seconds * (memory.tokens_per_second or targets.tokens_per_second)
    busy = (load for load in fleet.loads if load.pending_tokens >= room or _is_slow(load, targets))
    # One that computes nothing is stuck or has just begun.
    full = [load.tokens_per_second for load in busy if load.tokens_per_second > 0]
    if not full:
        return memory.tokens_per_second
    known, seen = memory.tokens_per_second or targets.tokens_per_second, sum(full) / len(full)
    return seen + (known - seen) * math.exp((memory.now - fleet.now) / _SPEED_WINDOW_SECONDS)
