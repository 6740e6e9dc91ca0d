from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.gate.statistics import (
    bootstrap_means,
    holm,
    interval,
    lower_bound,
    randomization_test,
    sign_test,
)


def enumerated(differences: list[float]) -> float:
    """The mid-p value, by all 2^n choices of signs."""
    observed = sum(differences)
    sums = [
        sum(sign * abs(each) for sign, each in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    higher = sum(each > observed + 1e-9 for each in sums)
    same = sum(abs(each - observed) <= 1e-9 for each in sums)
    return max((higher + same / 2) / len(sums), 0.5 ** sum(each > 0 for each in differences))


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (1, 0, 0.5), (5, 0, 1 / 32), (0, 5, 1.0), (9, 1, 6 / 1024), (3, 3, 0.5)],
)
def test_the_sign_test_counts_binomial_tails_and_equal_outcomes_half(wins: int, losses: int, p_value: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p_value)
    binary = [1.0] * wins + [-1.0] * losses + [0.0] * 7
    assert randomization_test(binary) == pytest.approx(p_value)


@given(st.lists(st.integers(-20, 20), max_size=9))
def test_the_randomization_test_counts_all_swaps(units: list[int]) -> None:
    differences = [each / 20 for each in units]
    assert randomization_test(differences) == pytest.approx(enumerated(differences))


@pytest.mark.parametrize("size", [5, 10, 12, 30, 100, 200])
@pytest.mark.parametrize("churn", [0.02, 0.05, 0.15, 0.3, 0.7])
def test_equally_good_versions_differ_significantly_in_5_percent(size: int, churn: float) -> None:
    significant = 0.0
    for differing in range(size + 1):
        chance = math.comb(size, differing) * churn**differing * (1 - churn) ** (size - differing)
        outcomes = (
            math.comb(differing, wins) for wins in range(differing + 1) if sign_test(wins, differing - wins) <= 0.05
        )
        significant += chance * sum(outcomes) / 2**differing
    assert significant <= 0.0505


def test_the_randomization_test_of_many_examples_is_exact() -> None:
    draw = random.Random(1)
    differences = [draw.choice([-0.8, -0.25, 0.0, 0.4, 1.0]) for _ in range(400)]
    deviations = sum(differences) / sum(each**2 for each in differences) ** 0.5
    normal = 0.5 * (1 + math.erf(-deviations / 2**0.5))
    assert randomization_test(differences) == pytest.approx(normal, rel=0.1)
    assert randomization_test([1.0] * 3000 + [-0.5] * 3000) < 1e-9, "differences in coarser units"


def test_the_bootstrap_covers_the_mean_of_real_samples() -> None:
    draw = random.Random(0)
    covered = bounded = 0
    for _ in range(200):
        sample = [draw.choice([-1.0, 0.0, 0.0, 0.5, 1.0]) for _ in range(60)]
        means = bootstrap_means(sample)
        low, high = interval(means, 0.95)
        covered += low <= 0.1 <= high
        bounded += lower_bound(means, 0.95) <= 0.1
        assert low <= lower_bound(means, 0.95) <= sum(sample) / 60 <= high
    assert 0.91 <= covered / 200 <= 0.99 and 0.91 <= bounded / 200 <= 0.99


def test_a_sample_without_spread_has_a_bound_without_width() -> None:
    means = bootstrap_means([0.25] * 9)
    assert lower_bound(means, 0.95) == pytest.approx(0.25)
    assert interval(means, 0.95) == pytest.approx((0.25, 0.25))


def test_large_samples_are_drawn_in_parts() -> None:
    sample = [number % 7 / 7 for number in range(7000)]
    means = bootstrap_means(sample)
    assert len(means) == 2000 and means[0] < 3 / 7 < means[-1]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.randoms(use_true_random=False), st.floats(0, 2))
def test_bounds_are_monotone_and_ignore_the_order(sample: list[float], order: random.Random, more: float) -> None:
    before = bootstrap_means(sample)
    shuffled = order.sample(sample, len(sample))
    assert (bootstrap_means(shuffled) == before).all()
    shuffled[0] += more
    assert (bootstrap_means(shuffled) >= before).all()
    assert randomization_test(shuffled) <= randomization_test(sample) + 1e-12


def test_holm_corrects_the_smallest_most_and_keeps_the_order() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert corrected == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
    assert list(corrected) == ["a", "b", "c", "d"]
