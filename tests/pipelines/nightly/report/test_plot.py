"""The geometry of the charts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.report.forgetting import slice_histories
from loramill.pipelines.nightly.report.plot import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    gain_bars,
    plot_losses,
    plot_scores,
    whole_steps,
)
from loramill.pipelines.nightly.report.schema import ReportedGain

from .runs import forgetting


def numbers(points: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(3, [0, 1, 2, 3]), (60, [0, 10, 20, 30, 40, 50, 60]), (1, [0, 1]), (250, [0, 50, 100, 150, 200, 250])],
)
def test_steps_are_whole(last: int, ticks: list[int]) -> None:
    assert whole_steps(last) == ticks


def test_losses_near_zero_are_distinguished() -> None:
    plot = plot_losses({1: 4.0, 2: 0.05, 3: 0.02}, {3: 0.0})
    heights = [y for _, y in numbers(plot.train)]
    assert heights[2] - heights[1] > 10, "in the picture's units, of which it has 136"
    assert [label for _, label in plot.losses] == ["0.001", "0.01", "0.1", "1", "10"]
    assert plot_losses({}, {}).steps


losses = st.dictionaries(st.integers(0, 1_000_000), st.floats(0, 1e6), max_size=20)


@given(losses, losses)
def test_every_loss_is_inside_the_chart(train: dict[int, float], valid: dict[int, float]) -> None:
    plot = plot_losses(train, valid)
    drawn = [*numbers(plot.train), *numbers(plot.valid), *plot.valid_points]
    assert len(drawn) == len(train) + 2 * len(valid)
    assert all(LEFT <= x <= RIGHT and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in drawn)


def test_scores_are_lines_over_runs() -> None:
    plot = plot_scores(slice_histories(forgetting(runs=4)), lambda at: f"{at:.0f}")
    assert len(plot.lines) == 3 and len(plot.runs) == 4
    first, second = (numbers(line.points) for line in plot.lines[:2])
    assert [x for x, _ in second] == [x for x, _ in first][1:]
    assert [y for _, y in first] == sorted(y for _, y in first), "a falling score is lower in the chart"


def test_gains_share_one_scale_with_zero_in_the_middle() -> None:
    def gain(value: float, width: float) -> ReportedGain:
        low, high = value - width, value + width
        return ReportedGain(slice="new", against="champion", examples=9, gain=value, low=low, high=high)

    large, none, small, tiny = gain_bars([gain(0.3, 0.1), None, gain(-0.1, 0.1), gain(0.0, 0.0)])
    assert none is None and large is not None and small is not None and tiny is not None
    assert (large.low, large.high) == (87.0, 114.0) and (small.low, small.high) == (33.0, 60.0)
    assert tiny.gain == 60.0
