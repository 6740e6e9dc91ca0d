"""`loramill jobs watch`: a live table of all jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from time import sleep, time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loramill.cli.arguments import JobLimitOption, TenantOption
from loramill.cli.format import duration, make_console, print_message, styled_status
from loramill.client import Client
from loramill.client.models import Job
from loramill.errors import LoramillError, NotRunning, Overloaded, Unavailable
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
#: Lines of the screen without jobs: the header, the omitted jobs, the totals, and an empty line.
_RESERVED_LINES = 4


class JobPoller:
    """Polls the state of the newest jobs, at most `limit`, or of those with `job_ids`.

    Ended jobs do not change, so a poll reads only as far back as the oldest unfinished job.
    """

    def __init__(self, client: Client, tenant: str | None, limit: int, job_ids: Collection[str] | None = None) -> None:
        self._client, self._tenant, self._limit, self._job_ids = client, tenant, limit, job_ids
        self._known: dict[str, Job] = {}

    def poll(self) -> list[Job]:
        """Returns the current state of the jobs, newest first."""
        waited = {job.id for job in self._known.values() if not job.status.final}
        waited |= set(self._job_ids or ()) - self._known.keys()
        fresh: dict[str, Job] = {}
        for job in islice(self._client.jobs.list(self._tenant), None if self._job_ids else self._limit):
            if not waited and (self._job_ids or job.id in self._known):
                break
            waited.discard(job.id)
            if not self._job_ids or job.id in self._job_ids:
                fresh[job.id] = job
        older = {job_id: job for job_id, job in self._known.items() if job_id not in fresh}
        self._known = {**fresh, **older}
        return list(self._known.values())[: self._limit]


def watch(
    tenant: TenantOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Refresh interval in seconds.")] = 1.0,
    limit: JobLimitOption = 1000,
) -> None:
    """Show a live table of all jobs until they have ended: status, progress, losses, speed, time left.

    The table waits for an unreachable gateway. Ctrl-C ends the table, not the jobs.
    """
    with Client() as client:
        jobs = JobPoller(client, tenant, limit)
        found = jobs.poll()
        if once or not found:
            _print_jobs(found)
        else:
            _follow(jobs.poll, interval)


def watch_until_done(
    client: Client, job_ids: Collection[str], *, quiet: bool = False, poll_seconds: float = 1.0
) -> list[Job]:
    """Waits until all of these jobs have ended, showing them unless `quiet`; returns their final state."""
    return _follow(JobPoller(client, None, len(job_ids), job_ids).poll, poll_seconds, quiet=quiet)


@contextmanager
def explain_interrupt(ids: Sequence[str]) -> Iterator[None]:
    """On Ctrl-C within the block, prints that these jobs continue, and how to cancel them."""
    try:
        yield
    except KeyboardInterrupt:
        if len(ids) == 1:
            print_message(f"The job continues; `loramill jobs cancel {ids[0]}` cancels it.")
        else:
            print_message(
                f"The {len(ids)} jobs continue; `loramill jobs watch` shows them, `loramill jobs cancel` cancels them."
            )
        raise


def _print_jobs(jobs: Sequence[Job]) -> None:
    if jobs:
        screen = make_console()
        screen.print(jobs_table(jobs, time(), screen.width))
    else:
        print_message("No jobs yet: `loramill submit TENANT/ADAPTER --train FILE` submits one.")


def _follow(poll: Callable[[], list[Job]], poll_seconds: float, *, quiet: bool = False) -> list[Job]:
    """Draws the polled jobs until all have ended. An outage ends it only before the first successful poll."""
    screen = make_console()
    live = Live(console=screen, auto_refresh=False, transient=True) if screen.is_terminal and not quiet else None
    jobs, away = poll(), None
    with live or nullcontext():
        while not all(job.status.final for job in jobs):
            if live is not None:
                live.update(
                    jobs_table(jobs, time(), screen.width, rows=screen.height - _RESERVED_LINES, outage=away),
                    refresh=True,
                )
            sleep(poll_seconds)
            try:
                jobs, away = poll(), None
            except (NotRunning, Unavailable, Overloaded) as error:
                away = error
    if not quiet:
        _print_jobs(jobs)
    return jobs


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
        duration(job.estimated_finish - now) if job.estimated_finish else "-",
    )


def _format_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _count_by_status(jobs: Iterable[Job]) -> str:
    counts = Counter(job.status for job in jobs)
    return ", ".join(f"{counts[status]} {status}" for status in _STATUS_ORDER if counts[status])


def _total_speed(jobs: Iterable[Job]) -> str:
    total = sum(job.tokens_per_second or 0 for job in jobs if job.status is JobStatus.RUNNING)
    return f"; {total:,.0f} tokens/s" if total else ""
