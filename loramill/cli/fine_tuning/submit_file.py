"""`loramill submit --file`: submit all jobs of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.progress import TaskID

from loramill.cli.fine_tuning.uploads import report_warnings
from loramill.cli.fine_tuning.watch import explain_interrupt, watch_until_done
from loramill.cli.format import print_json, print_message, print_table, progress_bar, styled_status
from loramill.cli.tenants.create import create_missing_tenants
from loramill.client import Client
from loramill.client.models import SubmittedJob
from loramill.plural import counted
from loramill.submission.job_file import check_entries, read_jobs


def submit_file(
    file: Path, defaults: Mapping[str, Any], *, name: str, retry: bool, wait: bool, create_tenants: bool, json: bool
) -> None:
    """Submits the jobs of a file, and prints them.

    Args:
        file: the jobs.
        defaults: options of the jobs that do not set them.
        name: name of the batch.
        retry: submit failed and cancelled jobs again.
        wait: show progress until all jobs have ended; exits with 1 if one failed.
        create_tenants: create the tenants that do not exist.
        json: print the jobs as JSON.
    """
    rows = read_jobs(file, defaults)  # before any request to the gateway
    if create_tenants:
        create_missing_tenants({entry.adapter.tenant for entry in check_entries(rows)})
    with Client() as client:
        with _progress_callback() as on_progress:
            found = client.jobs.submit_many(
                file, defaults=defaults, name=name, retry=retry, on_progress=on_progress, on_upload=report_warnings
            )
        if json and not wait:
            return print_json(found)
        if not json:
            _print_submitted(found)
        if wait:
            _wait_for_all(client, [each.job.id for each in found], json=json)
    return None


def _wait_for_all(client: Client, ids: Sequence[str], *, json: bool) -> None:
    """Shows the jobs until all have ended; exits with 1 if one failed."""
    with explain_interrupt(ids):
        jobs = watch_until_done(client, ids, quiet=json)
    if json:
        print_json(jobs)
    if any(job.failure for job in jobs):
        raise typer.Exit(1)


@contextmanager
def _progress_callback() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (what, done, total) that shows one bar per kind of work."""
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield on_progress


def _print_submitted(found: Sequence[SubmittedJob]) -> None:
    print_table(
        ("JOB", "ADAPTER", "STATUS", ""),
        (
            (each.job.id, each.job.adapter, styled_status(each.job.status), "new" if each.new else "existed")
            for each in found
        ),
        empty="",
    )
    new = sum(each.new for each in found)
    before = f", {len(found) - new} were submitted before" if new < len(found) else ""
    print_message(f"{counted(new, 'job')} submitted{before}; `loramill jobs watch` shows them all.")
