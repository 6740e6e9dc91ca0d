"""Tests of whether a version is worse than another, by counts and by histograms. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping


def fisher_greater(events: int, of: int, baseline_events: int, baseline_of: int) -> float:
    """Returns the p-value of Fisher's exact test, one-sided: whether events are more frequent than in the baseline.

    It is the probability of at least `events` of all events in the first group, if both have the same rate. It is 1 if
    either group is empty.

    Args:
        events: requests of the first group in which it happened.
        of: all requests of the first group.
        baseline_events: requests of the baseline in which it happened.
        baseline_of: all requests of the baseline.
    """
    total, everything = events + baseline_events, of + baseline_of
    all_ways = _log_choose(everything, total)
    most = min(total, of)
    ways = [_log_choose(of, k) + _log_choose(baseline_of, total - k) - all_ways for k in range(events, most + 1)]
    return min(1.0, math.fsum(map(math.exp, ways)))


def binomial_greater(events: int, of: int, rate: float) -> float:
    """Returns the p-value of the exact binomial test, one-sided: whether events are more frequent than `rate`."""
    if rate <= 0:
        return 1.0 if events == 0 else 0.0
    if rate >= 1:
        return 1.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    return min(
        1.0,
        math.fsum(math.exp(_log_choose(of, k) + k * log_rate + (of - k) * log_rest) for k in range(events, of + 1)),
    )


def slower(histogram: Mapping[int, int], baseline: Mapping[int, int], buckets: int) -> float:
    """Returns the p-value of whether latencies are longer than those of the baseline by more than some buckets.

    Mann-Whitney's test, one-sided, of the histogram against the baseline moved by `buckets`, in its normal
    approximation with the correction for ties. As it compares ranks, a few very slow requests decide nothing.

    Args:
        histogram: number of requests by bucket, whose widths grow by a constant factor.
        baseline: the same of the baseline.
        buckets: how many buckets slower the requests may be.
    """
    moved = {bucket + buckets: count for bucket, count in baseline.items()}
    ours, theirs = sum(histogram.values()), sum(moved.values())
    if not ours or not theirs:
        return 1.0
    below, u, ties = 0, 0.0, 0
    for bucket in sorted({*histogram, *moved}):
        one, other = histogram.get(bucket, 0), moved.get(bucket, 0)
        u += one * (below + other / 2)
        ties += (one + other) ** 3 - (one + other)
        below += other
    everything = ours + theirs
    variance = ours * theirs / 12 * (everything + 1 - ties / (everything * (everything - 1)))
    if variance <= 0:
        return 1.0  # all in one bucket
    return math.erfc((u - ours * theirs / 2) / math.sqrt(2 * variance)) / 2


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
