"""`loramill jobs watch`: all jobs in one table that is kept up to date."""

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

from loramill.cli import show
from loramill.client import Client
from loramill.client.models import Job
from loramill.errors import LoramillError, NotRunning, Overloaded, Unavailable
from loramill.plural import counted
from loramill.types import JobStatus

#: What is looked at first stands first.
_ORDER = (
    JobStatus.RUNNING,
    JobStatus.PAUSED,
    JobStatus.VALIDATING,
    JobStatus.QUEUED,
    JobStatus.FAILED,
    JobStatus.CANCELLED,
    JobStatus.SUCCEEDED,
)
#: The columns, and the width of a screen from which on each is shown.
_COLUMNS = {
    "JOB": 104,
    "ADAPTER": 0,
    "STATE": 0,
    "PROGRESS": 122,
    "STEP": 0,
    "LOSS": 0,
    "VALID": 0,
    "TOK/S": 0,
    "ETA": 0,
}
_NUMBERS = ("STEP", "LOSS", "VALID", "TOK/S", "ETA")
#: Lines of a screen that aren't jobs: the header, what isn't shown, the sum, and a line of air.
_AROUND = 4


class Jobs:
    """The newest jobs, at most `limit`, or `only` some, as they were when they were last looked at.

    What has ended never changes, so a look goes only as far back as the oldest job that hasn't.
    """

    def __init__(self, client: Client, tenant: str | None, limit: int, only: Collection[str] | None = None) -> None:
        self._client, self._tenant, self._limit, self._only = client, tenant, limit, only
        self._known: dict[str, Job] = {}

    def look(self) -> list[Job]:
        """The jobs as they are now, newest first."""
        waited = {job.id for job in self._known.values() if not job.status.final}
        waited |= set(self._only or ()) - self._known.keys()
        fresh: dict[str, Job] = {}
        for job in islice(self._client.jobs(self._tenant), None if self._only else self._limit):
            if not waited and (self._only or job.id in self._known):
                break
            waited.discard(job.id)
            if not self._only or job.id in self._only:
                fresh[job.id] = job
        older = {job_id: job for job_id, job in self._known.items() if job_id not in fresh}
        self._known = {**fresh, **older}
        return list(self._known.values())[: self._limit]


def watch(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of this tenant only (for an admin's key).")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print all of it once and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many jobs, the newest.")] = 1000,
) -> None:
    """Show all jobs until they have ended: state, progress, losses, speed, time left.

    A gateway that is away is waited for. Ctrl-C ends the watching, not the jobs.
    """
    with Client() as client:
        jobs = Jobs(client, tenant, limit)
        found = jobs.look()
        if once or not found:
            _print(found)
        else:
            _follow(jobs.look, every)


def watch_until_done(client: Client, only: Collection[str], *, quiet: bool = False, every: float = 1.0) -> list[Job]:
    """Shows (unless `quiet`) these jobs until all have ended; returns them as they ended."""
    return _follow(Jobs(client, None, len(only), only).look, every, quiet=quiet)


@contextmanager
def continuing(ids: Sequence[str]) -> Iterator[None]:
    """On Ctrl-C in the block, says that the jobs with these ids continue, and how to end them."""
    try:
        yield
    except KeyboardInterrupt:
        if len(ids) == 1:
            show.say(f"The job continues; `loramill jobs cancel {ids[0]}` ends it.")
        else:
            show.say(
                f"The {len(ids)} jobs continue; `loramill jobs watch` shows them, `loramill jobs cancel` ends them."
            )
        raise


def _print(jobs: Sequence[Job]) -> None:
    if jobs:
        screen = show.screen()
        screen.print(table(jobs, time(), screen.width))
    else:
        show.say("No jobs yet: `loramill submit TENANT/ADAPTER --train FILE` submits one.")


def _follow(look: Callable[[], list[Job]], every: float, *, quiet: bool = False) -> list[Job]:
    """Draws what `look` sees until all has ended. Only a gateway that has answered once is waited for."""
    screen = show.screen()
    live = Live(console=screen, auto_refresh=False, transient=True) if screen.is_terminal and not quiet else None
    jobs, away = look(), None
    with live or nullcontext():
        while not all(job.status.final for job in jobs):
            if live is not None:
                live.update(table(jobs, time(), screen.width, rows=screen.height - _AROUND, away=away), refresh=True)
            sleep(every)
            try:
                jobs, away = look(), None
            except (NotRunning, Unavailable, Overloaded) as error:
                away = error
    if not quiet:
        _print(jobs)
    return jobs


def table(
    jobs: Sequence[Job], now: float, width: int, *, rows: int | None = None, away: LoramillError | None = None
) -> RenderableType:
    """The table, of at most so many rows, the most interesting first; then the sums. `width` in characters."""
    ranked = sorted(jobs, key=lambda job: _ORDER.index(job.status))
    shown = ranked if rows is None else ranked[: max(1, rows)]
    grid = Table(box=None, pad_edge=False, header_style="bold")
    columns = [column for column, least in _COLUMNS.items() if width >= least]
    for column in columns:
        grid.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    for job in shown:
        cells = dict(zip(_COLUMNS, _row(job, now), strict=True))
        grid.add_row(*(cells[column] for column in columns))
    parts: list[RenderableType] = [grid]
    if len(shown) < len(ranked):
        parts.append(Text(f"… and {_summed(ranked[len(shown) :])}", style="dim"))
    parts.append(Text(f"{counted(len(jobs), 'job')}: {_summed(ranked)}{_speed(jobs)}", style="bold"))
    if away is not None:
        parts.append(Text(f"The gateway is away; trying again. {away.message}", style="yellow"))
    return Group(*parts)


def _row(job: Job, now: float) -> tuple[RenderableType, ...]:
    asked = job.asked if job.asked and not job.status.final else None
    return (
        job.id,
        job.adapter,
        show.status(f"{job.status} ({asked})" if asked else job.status),
        ProgressBar(total=job.steps, completed=job.step, width=16),
        f"{job.step}/{job.steps}",
        _number(job.loss),
        _number(job.valid_loss),
        f"{job.tokens_per_second:,.0f}" if job.tokens_per_second and job.status is JobStatus.RUNNING else "-",
        show.duration(job.estimated_finish - now) if job.estimated_finish else "-",
    )


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _summed(jobs: Iterable[Job]) -> str:
    counts = Counter(job.status for job in jobs)
    return ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts[status])


def _speed(jobs: Iterable[Job]) -> str:
    total = sum(job.tokens_per_second or 0 for job in jobs if job.status is JobStatus.RUNNING)
    return f"; {total:,.0f} tokens/s" if total else ""
