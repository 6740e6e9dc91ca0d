"""`loramill jobs plot`: plot a job's losses in the terminal or into a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loramill.cli.arguments import JobArgument, JsonFlag
from loramill.cli.format import make_console, print_json, print_line, print_message
from loramill.client import Client
from loramill.client.models import Job, MetricPoint
from loramill.errors import DiskFull, SetupError

_INK, _MUTED, _TRAIN, _VALID = "#1f2933", "#9aa5b1", "#2b6cb0", "#c2410c"
#: Half width of the smoothing window as a fraction of all steps; at least one step.
_SMOOTHING_FRACTION = 1 / 24


def plot(
    job_id: JobArgument,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plot to this PNG file.")] = None,
    json: JsonFlag = False,
) -> None:
    """Plot the losses of a running or finished job."""
    with Client() as client:
        job = client.jobs.get(job_id)
        points = client.jobs.metrics(job.id)
    if json:
        print_json(points)
    elif not points:
        print_message(f"{job.id} has no measurements yet: it is {job.status} at step {job.step}.")
    elif png is None:
        print_line(render_text(job, points, *_terminal_size()))
    else:
        write_png(png, job, points)
        print_message(f"{png} shows {len(points)} steps of {job.id}.")


def render_text(job: Job, points: Sequence[MetricPoint], width: int, height: int) -> str:
    """Draws the plot as text of this many columns and lines."""
    import plotext

    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height - 1)
    figure.theme("colorless")
    figure.legend(False)  # it would cover the curve
    steps, losses = _series(points, "train_loss")
    figure.draw(figure.signal(steps, losses, marker="braille").lines())
    ticks = integer_ticks(points[0].step, points[-1].step)
    figure.ruler("x").ticks(ticks, [str(tick) for tick in ticks])
    steps, losses = _series(points, "valid_loss")
    if steps:
        figure.draw(figure.signal(steps, losses, marker="o"))
    head = f"{job.adapter}: training (line) and validation (o) loss in nats per token"
    return "\n".join([head, *(line.rstrip() for line in plotext.uncolorize(figure.build().string()).splitlines())])


def write_png(path: Path, job: Job, points: Sequence[MetricPoint]) -> None:
    """Writes the plot as a PNG.

    Raises:
        DiskFull, SetupError: The file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, points)
    axes.set_title(f"{job.adapter}", loc="left", color=_INK, fontsize=13, fontweight="bold")
    axes.set_title(_subtitle(job), loc="right", color=_MUTED, fontsize=9)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        kind = DiskFull if error.errno == 28 else SetupError
        raise kind(f"{path} can't be written: {error.strerror}.") from error


def _draw(axes: Any, points: Sequence[MetricPoint]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, losses = _series(points, "train_loss")
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=1, marker="." if len(steps) == 1 else None)
    axes.plot(steps, smoothed(losses), color=_TRAIN, linewidth=2, label="training, smoothed")
    steps, losses = _series(points, "valid_loss")
    if steps:
        axes.plot(steps, losses, color=_VALID, linewidth=1.5, marker="o", markersize=4, label="validation")
        best = min(range(len(losses)), key=losses.__getitem__)
        axes.annotate(
            f"{losses[best]:.3f}",
            (steps[best], losses[best]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="right" if steps[best] > 0.9 * steps[-1] else "center",
            color=_VALID,
            fontsize=9,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss, nats per token", color=_INK)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(axis="y", color=_MUTED, alpha=0.25)
    axes.tick_params(colors=_INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Returns centered moving means; the window narrows toward both ends, so that they do not lag behind."""
    widest, last = max(1, round(len(losses) * _SMOOTHING_FRACTION)), len(losses) - 1
    means = []
    for middle in range(len(losses)):
        side = min(widest, middle, last - middle)
        means.append(sum(losses[middle - side : middle + side + 1]) / (2 * side + 1))
    return means


def integer_ticks(first: int, last: int, count: int = 7) -> list[int]:
    """Returns at most `count` ticks from `first` to `last`, spaced by 1, 2 or 5 times a power of ten."""
    by = next(
        unit * 10**power for power in range(9) for unit in (1, 2, 5) if (last - first) // (unit * 10**power) < count
    )
    return list(range(-(-first // by) * by, last + 1, by))


def _series(points: Sequence[MetricPoint], name: str) -> tuple[list[int], list[float]]:
    known = [(point.step, value) for point in points if (value := getattr(point, name)) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _subtitle(job: Job) -> str:
    spec = job.spec
    return f"{spec.get('method')}, rank {spec.get('rank')}, {job.status} at step {job.step} of {job.steps}   {job.id}"


def _terminal_size() -> tuple[int, int]:
    screen = make_console()
    return min(screen.width, 100), min(max(12, screen.height - 4), 28) if screen.is_terminal else 24
