"""The table of jobs that `loramill jobs watch` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loramill.cli.format import styled_status
from loramill.client.models import Job
from loramill.durations import rounded_duration
from loramill.errors import LoramillError
from loramill.plural import counted
from loramill.types import JobStatus

#: Order of the rows.
_STATUS_ORDER = (
    JobStatus.RUNNING,
    JobStatus.PAUSED,
    JobStatus.VALIDATING,
    JobStatus.QUEUED,
    JobStatus.FAILED,
    JobStatus.CANCELLED,
    JobStatus.SUCCEEDED,
)
#: Column -> minimum width of the screen for which it is shown.
_COLUMN_MIN_WIDTHS = {
    "JOB": 104,
    "ADAPTER": 0,
    "STATUS": 0,
    "PROGRESS": 122,
    "STEP": 0,
    "LOSS": 0,
    "VALID": 0,
    "TOK/S": 0,
    "ETA": 0,
}
_NUMERIC_COLUMNS = ("STEP", "LOSS", "VALID", "TOK/S", "ETA")


def jobs_table(
    jobs: Sequence[Job], now: float, width: int, *, rows: int | None = None, outage: LoramillError | None = None
) -> RenderableType:
    """Builds the table of at most `rows` jobs, unfinished ones first, with totals. `width` is in characters."""
    ranked = sorted(jobs, key=lambda job: _STATUS_ORDER.index(job.status))
    shown = ranked if rows is None else ranked[: max(1, rows)]
    grid = Table(box=None, pad_edge=False, header_style="bold")
    columns = [column for column, least in _COLUMN_MIN_WIDTHS.items() if width >= least]
    for column in columns:
        grid.add_column(column, justify="right" if column in _NUMERIC_COLUMNS else "left", no_wrap=True)
    for job in shown:
        cells = dict(zip(_COLUMN_MIN_WIDTHS, _row(job, now), strict=True))
        grid.add_row(*(cells[column] for column in columns))
    parts: list[RenderableType] = [grid]
    if len(shown) < len(ranked):
        parts.append(Text(f"… and {_count_by_status(ranked[len(shown) :])}", style="dim"))
    parts.append(Text(f"{counted(len(jobs), 'job')}: {_count_by_status(ranked)}{_total_speed(jobs)}", style="bold"))
    if outage is not None:
        parts.append(Text(f"Gateway unreachable; retrying. {outage.message}", style="yellow"))
    return Group(*parts)


def _row(job: Job, now: float) -> tuple[RenderableType, ...]:
    pending = job.pending_action if job.pending_action and not job.status.final else None
    return (
        job.id,
        job.adapter,
        styled_status(f"{job.status} ({pending})" if pending else job.status),
        ProgressBar(total=job.steps, completed=job.step, width=16),
        f"{job.step}/{job.steps}",
        _format_loss(job.loss),
        _format_loss(job.valid_loss),
        f"{job.tokens_per_second:,.0f}" if job.tokens_per_second and job.status is JobStatus.RUNNING else "-",
        rounded_duration(job.estimated_finish - now) if job.estimated_finish else "-",
    )


def _format_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _count_by_status(jobs: Iterable[Job]) -> str:
    counts = Counter(job.status for job in jobs)
    return ", ".join(f"{counts[status]} {status}" for status in _STATUS_ORDER if counts[status])


def _total_speed(jobs: Iterable[Job]) -> str:
    total = sum(job.tokens_per_second or 0 for job in jobs if job.status is JobStatus.RUNNING)
    return f"; {total:,.0f} tokens/s" if total else ""
