"""Rollouts: how a version takes over the traffic of an adapter, and what its answers were like meanwhile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

from pydantic import Field

from loramill.types.base import FrozenModel

#: Buckets of a latency histogram per factor of two: neighbors differ by 19%.
LATENCY_BUCKETS_PER_DOUBLING = 4
#: Seconds of the shortest latency that has a bucket of its own.
_SHORTEST_SECONDS = 0.001


class WatchLimits(FrozenModel):
    """How much worse the answers of a new version may be before it is rolled back."""

    min_requests: int = Field(
        default=50,
        ge=1,
        description="Minimum number of requests before versions are compared.",
    )
    max_error_rate_increase: float = Field(
        default=0.02, ge=0, le=1, description="By how much the fraction of failed requests may rise."
    )
    max_empty_rate_increase: float = Field(
        default=0.02, ge=0, le=1, description="By how much the fraction of empty answers may rise."
    )
    max_cut_rate_increase: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="By how much the fraction of answers that reach their length limit may rise.",
    )
    max_rating_decrease: float = Field(
        default=0.1, ge=0, le=1, description="By how much the fraction of good ratings may fall."
    )
    max_latency_ratio: float = Field(
        default=1.5,
        ge=1,
        allow_inf_nan=False,
        description="Largest ratio of the time per answer to that of the version before.",
    )


class WatchPolicy(WatchLimits):
    """How long the answers of a new version are compared, and how much worse they may be."""

    window_seconds: float = Field(default=3600.0, ge=0, description="How long the versions are compared, in seconds.")


class Introduction(FrozenModel):
    """How a version that passed the gate takes over."""

    share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the requests that it answers before it is promoted, 0 to 1; 0: it is promoted at once.",
    )
    shadow: bool = Field(default=False, description="Whether it answers copies of that share, which are not sent.")
    policy: WatchPolicy = Field(default=WatchPolicy(), description="When it is rolled back.")


class RolloutKind(StrEnum):
    """What a rollout does with the traffic."""

    CANARY = "canary"  # the challenger answers a share
    SHADOW = "shadow"  # the challenger answers copies of a share, which are not sent
    WATCH = "watch"  # a new champion answers everything


class RolloutOutcome(StrEnum):
    """How a rollout ended."""

    PROMOTED = "promoted"  # the challenger became the champion
    ROLLED_BACK = "rolled back"  # the new version was worse
    KEPT = "kept"  # the new champion passed its watch
    ENDED = "ended"  # by hand, or an alias moved


class RolloutRecord(FrozenModel):
    """A canary, a shadow or a watch of an adapter; at most one is open."""

    id: int = Field(description="Number of the rollout.")
    adapter: str = Field(description="Name of the adapter.")
    kind: RolloutKind = Field(
        description="What it does with the traffic. canary: the version answers a share of the requests. shadow: it "
        "answers copies of them, which are compared and not sent. watch: it is a new champion."
    )
    version: str = Field(description="Version that is tried.")
    baseline: str | None = Field(description="Version that it is compared with. Null: none.")
    share: float = Field(description="Share of the requests that the version answers, 0 to 1.")
    run: str | None = Field(description="Nightly run that started it. Null: it was started by hand.")
    policy: WatchPolicy = Field(description="When the version is rolled back.")
    started_at: float = Field(description="When it started, in seconds since the epoch.")
    ends_at: float | None = Field(description="When it is decided, in seconds since the epoch. Null: by hand.")
    ended_at: float | None = Field(default=None, description="When it ended. Null: it is open.")
    outcome: RolloutOutcome | None = Field(default=None, description="How it ended. Null: it is open.")
    reason: str = Field(default="", description="Why it ended.")


class TrafficCounts(FrozenModel):
    """What the answers of one version were like; the sums of several gateways and times can be added.

    A histogram maps a bucket, see `latency_bucket`, to its number of answers.
    """

    requests: int = Field(default=0, description="Number of requests.")
    errors: int = Field(default=0, description="Number of requests that failed.")
    empty: int = Field(default=0, description="Number of requests with an empty answer.")
    cut: int = Field(default=0, description="Number of requests with an answer that reached its length limit.")
    good: int = Field(default=0, description="Number of good ratings.")
    bad: int = Field(default=0, description="Number of bad ratings.")
    total_histogram: dict[int, int] = Field(default={}, description="Requests by time to the end of the answer.")

    @property
    def answers(self) -> int:
        """Number of requests that did not fail."""
        return self.requests - self.errors

    def __add__(self, other: TrafficCounts) -> TrafficCounts:
        return total((self, other))


class RolloutState(RolloutRecord):
    """A rollout with what it has measured."""

    tried: TrafficCounts = Field(description="Answers of the version that is tried.")
    compared: TrafficCounts = Field(description="Answers of the version that it is compared with.")
    slowdown: float = Field(
        default=1.0,
        ge=1,
        description="How many times as long as before the answers of other adapters take, during a watch; at least 1.",
    )


def latency_bucket(seconds: float) -> int:
    """Returns the bucket of a latency: 0 up to 1 ms, and four buckets per factor of two above it."""
    return max(0, math.ceil(LATENCY_BUCKETS_PER_DOUBLING * math.log2(max(seconds, _SHORTEST_SECONDS) * 1000)))


def bucket_seconds(bucket: int) -> float:
    """Returns the longest latency of a bucket."""
    return float(_SHORTEST_SECONDS * 2 ** (bucket / LATENCY_BUCKETS_PER_DOUBLING))


def median_bucket(histogram: Mapping[int, int]) -> int | None:
    """Returns the bucket of the median; None without requests."""
    half = sum(histogram.values()) / 2
    for bucket in sorted(histogram):
        half -= histogram[bucket]
        if half <= 0 and histogram[bucket]:
            return bucket
    return None


def total(parts: Iterable[TrafficCounts]) -> TrafficCounts:
    """Returns the sum of counts."""
    sums: dict[str, int] = {}
    histograms: dict[str, Counter[int]] = {}
    for part in parts:
        for name in TrafficCounts.model_fields:
            value = getattr(part, name)
            if isinstance(value, Mapping):
                histograms.setdefault(name, Counter()).update(value)
            else:
                sums[name] = sums.get(name, 0) + value
    sorted_histograms = {name: dict(sorted(histogram.items())) for name, histogram in histograms.items()}
    return TrafficCounts.model_validate(sums | sorted_histograms)
