"""The decision about a rollout, from what the answers of both versions were like. A pure function.

A version is rolled back if a rate rose by more than the policy allows and chance does not explain the rise. The
decision is taken again and again while requests come in, so the level of each test is far below 5%: at 0.001, of 300
simulated rollouts of a version that is as good as the other, with a decision after every 10 of 2,000 requests, at most
1.3% were rolled back for a signal, whose rate was between 1% and 50%.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from loramill.pipelines.nightly.rollouts.statistics import binomial_greater, fisher_greater, slower
from loramill.plural import counted
from loramill.types import RolloutKind, RolloutState, TrafficCounts
from loramill.types.rollouts import LATENCY_BUCKETS_PER_DOUBLING, bucket_seconds, median_bucket

#: p-value below which a rise is not chance.
LEVEL = 0.001
#: The same at the end of a rollout with too few requests to compare: then a canary is not promoted.
LEVEL_OF_DOUBT = 0.05
#: For how long after its window a rollout with too few requests continues. A version that takes over at night meets its
#: users in the morning; a run of the next night finds the rollout ended.
PATIENCE_SECONDS = 20 * 3600.0
#: Largest fraction of empty answers if nothing is known of the version before, for which they may be usual.
MAX_UNKNOWN_EMPTY_RATE = 0.5


class RolloutVerdict(StrEnum):
    """What to do about a rollout."""

    CONTINUE = "continue"
    PROMOTE = "promote"  # of a watch: keep the new champion
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True)
class RolloutDecision:
    """What to do about a rollout, and the reason in words."""

    verdict: RolloutVerdict
    reason: str


@dataclass(frozen=True, slots=True)
class _Rise:
    """How much worse a version is in one respect.

    Attributes:
        by: the rise in the unit of `allowed`.
        allowed: the largest rise that is accepted.
        p: probability of such a rise by chance.
        words: the rise in words.
    """

    by: float
    allowed: float
    p: float
    words: str


def decide(state: RolloutState, *, now: float) -> RolloutDecision:
    """Decides about an open rollout.

    Until the version has the policy's number of requests, it is left alone. After that it is rolled back as soon as it
    is worse, and otherwise promoted, or kept, at the end of the window. If too few requests came until then, the window
    grows by at most `PATIENCE_SECONDS`; after that the gate's decision stands, unless there is reason for doubt.
    """
    policy, requests = state.policy, state.tried.requests
    enough = requests >= policy.min_requests
    over = state.ends_at is not None and now >= state.ends_at + (0 if enough else PATIENCE_SECONDS)
    level = LEVEL if enough else LEVEL_OF_DOUBT
    worse = [rise for rise in _rises(state) if rise.by > rise.allowed and rise.p < level]
    if worse and (enough or (over and state.kind is not RolloutKind.WATCH)):
        return RolloutDecision(
            RolloutVerdict.ROLL_BACK, f"{'; '.join(rise.words for rise in worse)} ({counted(requests, 'request')})"
        )
    if not over:
        missing = "" if enough else f", of at least {policy.min_requests}"
        return RolloutDecision(RolloutVerdict.CONTINUE, f"{counted(requests, 'request')} so far{missing}")
    if enough:
        return RolloutDecision(
            RolloutVerdict.PROMOTE, f"its answers to {counted(requests, 'request')} are not worse than the champion's"
        )
    return RolloutDecision(
        RolloutVerdict.PROMOTE,
        f"{counted(requests, 'request')} came, which are too few to compare: the gate's decision stands",
    )


def _rises(state: RolloutState) -> Iterator[_Rise]:
    policy, new, old = state.policy, state.tried, state.compared
    yield _rate("failed requests", new.errors, new.requests, old.errors, old.requests, policy.max_error_rate_increase)
    if old.requests < policy.min_requests:
        # Too little is known of the version before; a correct one fails no request.
        yield _absolute("failed requests", new.errors, new.requests, policy.max_error_rate_increase)
        yield _absolute("empty answers", new.empty, new.answers, MAX_UNKNOWN_EMPTY_RATE)
    for what, ours, theirs, allowed in (
        ("empty answers", new.empty, old.empty, policy.max_empty_rate_increase),
        ("answers cut at their length limit", new.cut, old.cut, policy.max_cut_rate_increase),
    ):
        yield _rate(what, ours, new.answers, theirs, old.answers, allowed)
    yield _rate("bad ratings", new.bad, new.good + new.bad, old.bad, old.good + old.bad, policy.max_rating_decrease)
    if state.kind is not RolloutKind.SHADOW:  # copies run at low priority, so that they take longer
        yield _latency(new, old, policy.max_latency_ratio, state.slowdown)


def _rate(what: str, events: int, of: int, old_events: int, old_of: int, allowed: float) -> _Rise:
    if not of or not old_of:
        return _Rise(0.0, allowed, 1.0, "")
    new, old = events / of, old_events / old_of
    words = f"{what} rose from {old:.1%} to {new:.1%}; at most +{allowed:.1%} is allowed"
    return _Rise(new - old, allowed, fisher_greater(events, of, old_events, old_of), words)


def _absolute(what: str, events: int, of: int, allowed: float) -> _Rise:
    rate = events / of if of else 0.0
    words = f"{what} are {rate:.1%}; at most {allowed:.1%} is allowed where there is little to compare with"
    return _Rise(rate, allowed, binomial_greater(events, of, allowed), words)


def _latency(new: TrafficCounts, old: TrafficCounts, ratio: float, slowdown: float) -> _Rise:
    """A load that makes all adapters slower says nothing about a version."""
    allowed = ratio * slowdown
    ours, theirs = median_bucket(new.total_histogram), median_bucket(old.total_histogram)
    if ours is None or theirs is None:
        return _Rise(0.0, allowed, 1.0, "")
    buckets = math.ceil(LATENCY_BUCKETS_PER_DOUBLING * math.log2(allowed))
    new_seconds, old_seconds = bucket_seconds(ours), bucket_seconds(theirs)
    words = (
        f"the median time per answer rose from {old_seconds:.2g} s to {new_seconds:.2g} s; "
        f"at most {ratio:g} times as long is allowed"
        + (f", times {slowdown:.2g} as all adapters are slower" if slowdown > 1 else "")
    )
    p = slower(new.total_histogram, old.total_histogram, buckets)
    return _Rise(new_seconds / old_seconds, allowed, p, words)
