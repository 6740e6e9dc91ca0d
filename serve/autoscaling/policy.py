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
_LEARNING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Targets:
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
    speed: float = 500.0
    first_token_seconds: float = 2.0
    usage: float = 0.7
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
class Fleet:
    """A base's replicas now.

    Attributes:
        now: seconds of any clock.
        wanted: replicas that were last decided on; some of them may not be up yet.
        up: the load of those that are.
        queued: requests at the gateways that no replica has taken.
        least, most: replicas that there may be.
    """

    now: float
    wanted: int
    up: tuple[ReplicaLoad, ...]
    queued: float
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Memory:
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
    asked: float
    changed: float
    speed: float | None = None
    enough: tuple[tuple[float, int], ...] = ()


class Reason(StrEnum):
    """Why there are to be so many replicas."""

    STEADY = "as before"
    BOUNDS = "the bounds have changed"
    WORK = "the pending work asks for it"
    FIRST_TOKEN = "first tokens take too long"
    FEWER = "fewer have been enough"
    IDLE = "nobody asks"


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there are to be, why, and what the next decision needs to know."""

    replicas: int
    reason: Reason
    memory: Memory


def decide(fleet: Fleet, memory: Memory | None, targets: Targets) -> Decision:
    """How many replicas there are to be from now on; `memory` is the last decision's."""
    memory = _seen(fleet, memory or Memory(fleet.now, fleet.now, fleet.now), targets)
    replicas, reason = _wanted(fleet, memory, targets)
    if replicas != fleet.wanted:
        memory = replace(memory, changed=fleet.now)
    return Decision(replicas, reason, memory)


def _wanted(fleet: Fleet, memory: Memory, targets: Targets) -> tuple[int, Reason]:
    bounded = max(fleet.least, min(fleet.most, fleet.wanted))
    if bounded != fleet.wanted:
        return bounded, Reason.BOUNDS
    pending = pending_tokens(fleet, targets)
    room = targets.pending_seconds * (memory.speed or targets.speed)
    if (work := min(fleet.most, math.ceil(pending / room))) > fleet.wanted:
        return work, Reason.WORK
    settled = len(fleet.up) >= fleet.wanted and fleet.now - memory.changed >= targets.settle_seconds
    if fleet.wanted < fleet.most and settled and any(_late(load, targets) for load in fleet.up):
        return fleet.wanted + 1, Reason.FIRST_TOKEN
    if fleet.least == 0 and fleet.now - memory.asked >= targets.idle_seconds:
        return 0, Reason.IDLE if fleet.wanted else Reason.STEADY
    enough = memory.enough[0][1]
    if enough < fleet.wanted and fleet.now - memory.changed >= targets.down_seconds:
        return max(1, fleet.least, enough), Reason.FEWER
    return fleet.wanted, Reason.STEADY


def pending_tokens(fleet: Fleet, targets: Targets) -> float:
    """All that is to be computed; requests that no replica has yet count as much as the others do on average."""
    tokens = sum(load.pending_tokens for load in fleet.up)
    requests = sum(load.running + load.waiting for load in fleet.up)
    return tokens + fleet.queued * (tokens / requests if requests else targets.request_tokens)


def _late(load: ReplicaLoad, targets: Targets) -> bool:
    # Where nothing waits, a first token takes as long as its prompt does, and more replicas don't help.
    return load.waiting > 0 and load.first_token_seconds > targets.first_token_seconds


def _seen(fleet: Fleet, memory: Memory, targets: Targets) -> Memory:
    speed = _learned(fleet, memory, targets)
    asked = fleet.queued > 0 or any(load.running or load.waiting for load in fleet.up)
    enough = _enough(fleet, speed or targets.speed, targets)
    since = fleet.now - targets.down_seconds
    kept = ((at, number) for at, number in memory.enough if at > since and number > enough)
    return Memory(
        now=fleet.now,
        asked=fleet.now if asked else memory.asked,
        changed=memory.changed,
        speed=speed,
        enough=(*kept, (fleet.now, enough)),
    )


def _enough(fleet: Fleet, speed: float, targets: Targets) -> int:
    """Replicas that would do with half of the work that each may have before it, and with the speed that is used."""
    pending = pending_tokens(fleet, targets) / (targets.pending_seconds * speed / 2)
    computed = sum(load.tokens_per_second for load in fleet.up) / (targets.usage * speed)
    return max(1, math.ceil(pending), math.ceil(computed))


def _learned(fleet: Fleet, memory: Memory, targets: Targets) -> float | None:
    """The speed of a full replica, a little nearer to that of those that have too much to do now."""
    room = targets.pending_seconds * (memory.speed or targets.speed)
    busy = (load for load in fleet.up if load.pending_tokens >= room or _late(load, targets))
    # One that computes nothing is stuck or has just begun.
    full = [load.tokens_per_second for load in busy if load.tokens_per_second > 0]
    if not full:
        return memory.speed
    known, seen = memory.speed or targets.speed, sum(full) / len(full)
    return seen + (known - seen) * math.exp((memory.now - fleet.now) / _LEARNING_SECONDS)
