"""The comparison as a chart: quality against parameters, memory and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from loramill.pipelines.compare.format import scaled, size
from loramill.pipelines.compare.types import Comparison, Subject, Training

#: Okabe and Ito's colors, which color-blind readers can distinguish.
COLORS: dict[Subject, str] = {
    "full": "#000000",
    "lora": "#0072B2",
    "qlora": "#56B4E9",
    "dora": "#009E73",
    "adalora": "#CC79A7",
    "prefix": "#D55E00",
    "bottleneck": "#E69F00",
}
INK, PALE, FAINT = "#333333", "#888888", "#E4E4E4"
METRICS = {"exact_match": "exact match on the test set", "rouge_l": "ROUGE-L on the test set"}

DPI = 160

#: Short names for labels.
NAMES: dict[Subject, str] = {"full": "full", "prefix": "prefix", "bottleneck": "bottleneck"}

#: Possible offsets of a label from its point, in points to the right and up; the nearest first.
LABEL_OFFSETS = [(x, sign * y) for y in range(0, 80, 5) for sign in (1, -1) for x in (8, -8)]


@dataclass(frozen=True, slots=True)
class CostPanel:
    """A panel of the chart.

    Attributes:
        value: the cost on the x axis.
        format: writes a cost as text.
        log: whether the axis is logarithmic.
    """

    title: str
    value: Callable[[Training], float]
    format: Callable[[float], str]
    log: bool = False


COSTS = (
    CostPanel("trained parameters", lambda training: training.parameters, scaled, log=True),
    CostPanel("memory for training, above the base", lambda training: training.memory.added, size),
    CostPanel("time per step", lambda training: training.step_seconds, lambda seconds: f"{seconds:g} s"),
)


@dataclass(frozen=True, slots=True)
class ChartPoint:
    """A trained subject and its quality."""

    subject: Subject
    name: str
    training: Training
    quality: float


def save_chart(comparison: Comparison, file: Path) -> None:
    """Writes the chart as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    build_figure(comparison).savefig(file, format="png")


def build_figure(comparison: Comparison) -> Figure:
    """Draws the rows with results; there must be at least one."""
    points = [
        ChartPoint(
            row.subject, NAMES.get(row.subject, row.title), row.training, getattr(row.quality, comparison.metric)
        )
        for row in comparison.rows
        if row.training and row.quality
    ]
    base = next((row.quality for row in comparison.rows if row.subject == "base"), None)
    figure = Figure(figsize=(12.5, 5.2), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"Fine-tuning {comparison.base} on {comparison.train}", x=0.01, ha="left", color=INK, fontsize=13, weight="bold"
    )
    axes: Sequence[Axes] = figure.subplots(1, len(COSTS), sharey=True)
    for axis, cost in zip(axes, COSTS, strict=True):
        _panel(axis, cost, points)
        if base is not None:
            _base_line(axis, getattr(base, comparison.metric), min(point.quality for point in points))
    axes[0].set_ylabel(METRICS[comparison.metric], color=INK)
    figure.draw_without_rendering()  # fixes the positions that labels must not cover
    for axis, cost in zip(axes, COSTS, strict=True):
        _labels(axis, cost, points)
    return figure


def _logarithmic(costs: Sequence[float]) -> Locator:
    """Ticks of a logarithmic axis; powers of ten alone suffice only if the costs differ by orders of magnitude."""
    ratio = max(costs) / min(costs)
    if ratio < 10:
        return MaxNLocator(4)
    return LogLocator(numticks=6) if ratio > 1000 else LogLocator(subs=(1, 3), numticks=6)


def _panel(axis: Axes, cost: CostPanel, points: Sequence[ChartPoint]) -> None:
    axis.set_title(cost.title, loc="left", fontsize=10.5, color=INK)
    axis.grid(color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(PALE)
    axis.tick_params(colors=PALE, length=0, labelsize=9)
    if cost.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(_logarithmic([cost.value(point.training) for point in points]))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.format(value)))
    axis.margins(x=0.22, y=0.12)
    for point in points:
        axis.scatter(cost.value(point.training), point.quality, s=52, color=COLORS[point.subject], zorder=3)
    if not cost.log:
        axis.set_xlim(left=0)


def _base_line(axis: Axes, value: float, worst: float) -> None:
    """Draws the base's quality: a line, or a note at the bottom if a line would compress the rest of the chart."""
    near = value > worst - 0.1
    if near:
        axis.axhline(value, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        "base, untuned" if near else f"base, untuned: {value:.2f} ↓",
        (1, value) if near else (1, 0),
        xycoords=("axes fraction", "data") if near else "axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=PALE,
    )


def _labels(axis: Axes, cost: CostPanel, points: Sequence[ChartPoint]) -> None:
    """Labels the points; each label is where it overlaps least with points, other labels and the margin."""
    frame = axis.get_window_extent()
    taken = [_point_box(axis, cost.value(point.training), point.quality) for point in points]
    taken += [text.get_window_extent() for text in axis.texts]
    for point in sorted(points, key=lambda point: -point.quality):
        at = cost.value(point.training), point.quality
        label = axis.annotate(
            point.name, at, (0, 0), textcoords="offset points", va="center", fontsize=9, color=COLORS[point.subject]
        )
        box = label.get_window_extent()
        across, up = axis.transData.transform(at)
        boxes = {
            (x, y): _label_box(across + x * DPI / 72, up + y * DPI / 72, box.width if x > 0 else -box.width, box)
            for x, y in LABEL_OFFSETS
        }
        offset = min(boxes, key=lambda offset: _overlapping_pixels(boxes[offset], taken, frame))
        taken.append(boxes[offset])
        label.set_position(offset)
        label.set_horizontalalignment("left" if offset[0] > 0 else "right")
        if abs(offset[1]) > 10:
            axis.annotate(
                "",
                at,
                offset,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.6},
            )


def _label_box(x: float, y: float, width: float, like: Bbox) -> Bbox:
    """A box of the height of `like` with the middle of one side at (x, y)."""
    return Bbox.from_extents(min(x, x + width), y - like.height / 2, max(x, x + width), y + like.height / 2)


def _overlapping_pixels(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> int:
    """Pixels of a label that overlap with something or are outside of the frame."""
    return round(sum(_overlap(box, other) for other in taken) + _area(box) - _overlap(box, frame))


def _point_box(axis: Axes, x: float, y: float) -> Bbox:
    """The box of a point in pixels."""
    (across, up), radius = axis.transData.transform((x, y)), 7.0
    return Bbox.from_extents(across - radius, up - radius, across + radius, up + radius)


def _overlap(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else _area(common)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)
