"""Scores of later versions on what earlier runs held out."""

from __future__ import annotations

import pytest

from loramill.pipelines.nightly.report.forgetting import RunScores, slice_histories

from .runs import forgetting


def test_each_slice_is_followed_from_the_run_that_held_it_out() -> None:
    first, second, third = slice_histories(forgetting(runs=4, loss=0.02))
    assert (first.run, second.run, third.run) == ("nightly-0", "nightly-1", "nightly-2")
    assert [each.run for each in second.scores] == ["nightly-1", "nightly-2", "nightly-3"]
    assert [each.score for each in first.scores] == pytest.approx([0.85, 0.83, 0.81, 0.79])
    assert (first.examples, first.change) == (10, pytest.approx(-0.06))


def test_a_run_that_scored_fewer_of_the_examples_is_left_out() -> None:
    runs = [
        RunScores("one", 1.0, frozenset("ab"), {"a": 1.0, "b": 0.0}),
        RunScores("two", 2.0, frozenset("c"), {"a": 1.0, "c": 1.0}),
        RunScores("three", 3.0, frozenset(), {"a": 1.0, "b": 1.0, "c": 0.0}),
    ]
    one, two = slice_histories(runs)
    assert [each.run for each in one.scores] == ["one", "three"] and one.change == 0.5
    assert [each.run for each in two.scores] == ["two", "three"] and two.change == -1.0


def test_a_single_score_shows_no_change() -> None:
    assert slice_histories(forgetting(runs=1)) == () and slice_histories([]) == ()
