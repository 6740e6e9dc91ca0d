"""`loramill jobs watch`: a live table of all jobs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from time import sleep, time
from typing import Annotated

import typer
from rich.live import Live

from loramill.cli.arguments import JobLimitOption, TenantOption
from loramill.cli.fine_tuning.job_table import jobs_table
from loramill.cli.format import make_console, print_message, progress_bar
from loramill.client import Client
from loramill.client.models import Job
from loramill.errors import NotRunning, Overloaded, Unavailable

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

    If the gateway becomes unreachable, the command keeps retrying. Ctrl-C ends the table, not the jobs.
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


def wait_with_progress(client: Client, job: Job) -> Job:
    """Waits until a job has succeeded, with a progress bar; returns its final state."""
    with progress_bar() as progress:
        task = progress.add_task(f"{job.adapter} {job.status}", total=job.steps)

        def advance(now: Job) -> None:
            progress.update(task, completed=now.step, description=f"{now.adapter} {now.status}")

        with explain_interrupt([job.id]):
            return client.jobs.wait(job.id, advance)


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
