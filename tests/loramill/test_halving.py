"""Successive halving: who trains on, to which step, and that decisions stay."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.halving import Rung, rungs, standing, trained_steps

counts, steps = st.integers(1, 64), st.integers(1, 2000)


@pytest.mark.parametrize(
    ("candidates", "length", "expected"),
    [
        (8, 80, [(10, 4), (20, 2), (80, 1)]),
        (2, 61, [(61, 1)]),
        (5, 100, [(13, 3), (25, 2), (100, 1)]),
        (64, 3, [(1, 2), (3, 1)]),
        (64, 1, [(1, 1)]),
        (1, 7, [(7, 1)]),
    ],
)
def test_candidates_are_halved_as_steps_double(candidates: int, length: int, expected: list[tuple[int, int]]) -> None:
    assert [(rung.step, rung.keep) for rung in rungs(candidates, length)] == expected


@given(counts, steps)
def test_the_last_rung_is_the_whole_training_of_one(candidates: int, length: int) -> None:
    ladder = rungs(candidates, length)
    assert ladder[-1] == Rung(length, 1)
    assert all(a.step < b.step and a.keep >= b.keep for a, b in pairwise(ladder))


@given(st.integers(8, 64), st.integers(64, 2000))
def test_a_sweep_costs_much_less_than_all_trainings(candidates: int, length: int) -> None:
    assert trained_steps(candidates, length) <= 0.45 * candidates * length


def test_eight_candidates_cost_three_trainings() -> None:
    assert trained_steps(8, 80) == 240 and trained_steps(1, 80) == 80


@given(st.data(), counts, steps)
def test_decisions_stay_and_the_lowest_loss_wins(data: st.DataObject, candidates: int, length: int) -> None:
    ladder = rungs(candidates, length)
    losses: list[list[float]] = [[] for _ in range(candidates)]
    failed: set[int] = set()
    before = standing(ladder, losses, failed)
    while before.live and before.decided < len(ladder):
        index = data.draw(st.sampled_from(before.live))
        if data.draw(st.integers(0, 9)) == 0:
            failed.add(index)
        elif len(losses[index]) == before.decided:
            # The lowest loss so far, as with `keep` = "best": it never rises.
            lowest = min(losses[index], default=10.0)
            losses[index].append(data.draw(st.floats(0.0, lowest)))
        after = standing(ladder, losses, failed)
        assert set(after.live) <= set(before.live) and after.decided >= before.decided
        assert before.dropped.items() <= after.dropped.items()
        assert not failed & set(after.live)
        assert len(after.live) <= ladder[after.decided - 1].keep if after.decided else True
        before = after
    if before.live:
        (best,) = before.live
        others = [losses[index][-1] for index in range(candidates) if index not in failed and losses[index]]
        assert losses[best][-1] <= min(others)


def test_a_rung_waits_for_all_but_the_failed() -> None:
    ladder = rungs(4, 40)
    assert standing(ladder, [[2.0], [1.0], [], [3.0]]).decided == 0
    found = standing(ladder, [[2.0], [1.0], [], [3.0]], {2})
    assert (found.live, found.dropped, found.decided) == ((0, 1), {3: 10}, 1)
    # One that fails later does not bring back what was dropped.
    assert standing(ladder, [[2.0], [1.0], [], [3.0]], {1, 2}).live == (0,)
