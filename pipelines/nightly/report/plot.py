"""The geometry of charts in SVG: losses by step, scores by run, gains with intervals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loramill.pipelines.nightly.report.schema import ReportedGain, SliceHistory

#: The plot's place in an SVG of 420 x 184: left, top, right, bottom.
LEFT, TOP, RIGHT, BOTTOM = 66.0, 10.0, 408.0, 146.0
#: Losses below are drawn here: on a logarithmic axis there is no zero.
LEAST_LOSS = 1e-3
#: The smallest scale of gains: smaller ones are not drawn large.
LEAST_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class LossPlot:
    """Loss curves in the coordinates of their SVG.

    Attributes:
        train, valid: polylines.
        valid_points: the points of `valid`.
        losses: positions and labels of the vertical axis, in decades.
        steps: positions and labels of the horizontal axis, in whole steps.
    """

    train: str
    valid: str
    valid_points: tuple[tuple[float, float], ...]
    losses: tuple[tuple[float, str], ...]
    steps: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class ScoreLine:
    """The scores on one slice: a polyline, and its last point."""

    points: str
    end: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ScorePlot:
    """Scores by run in the coordinates of their SVG.

    Attributes:
        lines: one per slice.
        scores: positions and labels of the vertical axis.
        runs: positions and labels of the horizontal axis.
    """

    lines: tuple[ScoreLine, ...]
    scores: tuple[tuple[float, str], ...]
    runs: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class GainBar:
    """Positions of a gain and its interval in an SVG of the width 120, with zero in the middle."""

    low: float
    gain: float
    high: float


def plot_losses(train: Mapping[int, float], valid: Mapping[int, float]) -> LossPlot:
    """Losses by step, in nats per token."""
    losses = [max(LEAST_LOSS, loss) for loss in (*train.values(), *valid.values())] or [1.0]
    last = max((*train, *valid), default=1) or 1
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
    high = max(high, low + 1)

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last

    def y(loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(max(LEAST_LOSS, loss)) - low) / (high - low)

    def line(points: Mapping[int, float]) -> str:
        return polyline([(x(step), y(loss)) for step, loss in sorted(points.items())])

    return LossPlot(
        train=line(train),
        valid=line(valid),
        valid_points=tuple((x(step), y(loss)) for step, loss in sorted(valid.items())),
        losses=tuple((y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)),
        steps=tuple((x(step), step) for step in whole_steps(last)),
    )


def plot_scores(histories: Sequence[SliceHistory], label: Callable[[float], str]) -> ScorePlot:
    """Scores over runs, a line per slice; the runs are equally far apart.

    Args:
        histories: at least one.
        label: writes the start of a run as text.
    """
    points = [score for each in histories for score in each.scores]
    starts = dict(sorted({(score.run, score.at) for score in points}, key=lambda run: run[::-1]))
    order = {run: position for position, run in enumerate(starts)}
    low = math.floor(10 * min(score.score for score in points)) / 10
    high = max(math.ceil(10 * max(score.score for score in points)) / 10, low + 0.1)

    def x(run: str) -> float:
        return LEFT + 20 + (RIGHT - LEFT - 40) * order[run] / max(1, len(order) - 1)

    def y(score: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (score - low) / (high - low)

    placed = [[(x(score.run), y(score.score)) for score in each.scores] for each in histories]
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    return ScorePlot(
        lines=tuple(ScoreLine(polyline(each), each[-1]) for each in placed),
        scores=tuple((y(tick), f"{tick:.3g}") for tick in ticks),
        runs=tuple((x(run), label(at)) for run, at in starts.items()),
    )


def gain_bars(gains: Sequence[ReportedGain | None]) -> list[GainBar | None]:
    """Gains on one scale, so that the bars of a table can be compared."""
    widest = max((abs(end) for each in gains if each for end in (each.low, each.high, each.gain)), default=0.0)

    def x(gain: float) -> float:
        return round(60 + 54 * gain / max(widest, LEAST_GAIN), 1)

    return [GainBar(x(each.low), x(each.gain), x(each.high)) if each else None for each in gains]


def whole_steps(last: int) -> list[int]:
    """At most seven round numbers of steps from 0 to `last`."""
    units = (unit * 10**power for power in range(9) for unit in (1, 2, 5))
    unit = next(unit for unit in units if last / unit <= 6)
    return list(range(0, last + 1, unit))


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """The points of an SVG polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
