"""The tests of rollouts, against scipy-free definitions."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.rollouts.statistics import binomial_greater, fisher_greater, slower
from loramill.types.rollouts import median_bucket

small = st.integers(0, 30)


@given(ours=small, theirs=small, data=st.data())
def test_fisher_is_the_tail_of_the_hypergeometric_distribution(ours: int, theirs: int, data: st.DataObject) -> None:
    events, old = data.draw(st.integers(0, ours)), data.draw(st.integers(0, theirs))
    tail = sum(
        math.comb(ours, k) * math.comb(theirs, events + old - k) for k in range(events, min(ours, events + old) + 1)
    )
    assert fisher_greater(events, ours, old, theirs) == pytest.approx(tail / math.comb(ours + theirs, events + old))


def test_known_p_values() -> None:
    # From R: fisher.test(matrix(c(8, 2, 1, 5), 2), alternative = "greater"), binom.test(5, 50, 0.02, "greater").
    assert fisher_greater(8, 10, 1, 6) == pytest.approx(0.02447552)
    assert binomial_greater(5, 50, 0.02) == pytest.approx(0.00321, abs=1e-4)
    assert fisher_greater(0, 0, 5, 10) == fisher_greater(3, 5, 0, 0) == 1.0


@given(of=st.integers(0, 200), rate=st.floats(0, 1), data=st.data())
def test_binomial_p_values_are_probabilities(of: int, rate: float, data: st.DataObject) -> None:
    events = data.draw(st.integers(0, of))
    assert 0 <= binomial_greater(events, of, rate) <= 1
    assert binomial_greater(0, of, rate) == pytest.approx(1)


buckets = st.dictionaries(st.integers(0, 20), st.integers(0, 5), max_size=6)


@given(ours=buckets, theirs=buckets, shift=st.integers(0, 3))
def test_slower_counts_the_pairs_of_which_ours_is_slower(
    ours: dict[int, int], theirs: dict[int, int], shift: int
) -> None:
    listed = [bucket for bucket, count in ours.items() for _ in range(count)]
    other = [bucket + shift for bucket, count in theirs.items() for _ in range(count)]
    u = sum((a > b) + (a == b) / 2 for a, b in product(listed, other))
    p = slower(ours, theirs, shift)
    if len(set(listed + other)) > 1 and listed and other:
        assert (p < 0.5) == (u > len(listed) * len(other) / 2) or u == len(listed) * len(other) / 2
    else:
        assert p == 1.0


def test_slower_has_its_level_and_ignores_few_slow_requests() -> None:
    random_ = random.Random(3)

    def latencies(count: int) -> dict[int, int]:
        drawn = [round(random_.gauss(30, 4)) for _ in range(count)]
        return {bucket: drawn.count(bucket) for bucket in drawn}

    below = sum(slower(latencies(80), latencies(200), 0) < 0.05 for _ in range(1000))
    assert 25 <= below <= 80
    assert slower({10: 97, 60: 3}, {10: 100}, 0) > 0.01
    assert slower({16: 100}, {10: 100}, 3) < 1e-9


def test_the_median_is_that_of_the_sorted_requests() -> None:
    assert median_bucket({}) is None
    assert median_bucket({3: 1}) == 3
    assert median_bucket({3: 0, 5: 2, 7: 1, 9: 1}) == 5
    assert median_bucket({1: 1, 5: 1, 9: 1}) == 5
