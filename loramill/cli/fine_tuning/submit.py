"""`loramill submit`: submit one fine-tune job, or a file of many."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loramill.cli.arguments import (
    ColumnsOption,
    JsonFlag,
    OptionalTrainOption,
    ValidColumnsOption,
    ValidOption,
)
from loramill.cli.fine_tuning.dry_run import dry_run
from loramill.cli.fine_tuning.job_options import with_job_options
from loramill.cli.fine_tuning.uploads import report_upload, report_warnings
from loramill.cli.fine_tuning.watch import explain_interrupt, watch_until_done
from loramill.cli.format import (
    make_console,
    print_json,
    print_line,
    print_message,
    print_table,
    short_version,
    styled_status,
)
from loramill.client import Client
from loramill.client.models import Job, SubmittedJob
from loramill.client.tenant_list import MAX_TENANTS_PER_REQUEST
from loramill.errors import Forbidden
from loramill.names import AdapterName
from loramill.plural import counted
from loramill.submission.job_file import check_entries, read_jobs
from loramill.submission.options import from_text

Adapter = Annotated[
    str | None,
    typer.Argument(
        metavar="TENANT/ADAPTER", help="Name of the adapter, such as acme/support; it is created with its first job."
    ),
]
Jobs = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="JOBS",
        help="Submit all jobs of a TOML, JSONL, CSV or TSV file; other options are defaults for these jobs.",
    ),
]
Name = Annotated[
    str, typer.Option(help="With --file: name of this batch; the same jobs are submitted again under another name.")
]
Retry = Annotated[bool, typer.Option("--retry", help="With --file: submit failed and cancelled jobs again.")]
CreateTenant = Annotated[
    bool, typer.Option("--create-tenant", help="Create tenants that do not exist (needs an admin's key).")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the data and show the training examples; nothing is stored or submitted."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Show progress until the jobs have ended.")]
Promote = Annotated[bool, typer.Option("--promote", help="Wait for the job, then make the new version the champion.")]


@with_job_options
def submit(
    adapter: Adapter = None,
    *,
    train: OptionalTrainOption = None,
    valid: ValidOption = None,
    columns: ColumnsOption = None,
    valid_columns: ValidColumnsOption = None,
    file: Jobs = None,
    name: Name = "",
    retry: Retry = False,
    wait: Wait = False,
    promote: Promote = False,
    create_tenant: CreateTenant = False,
    dry: DryRun = False,
    json: JsonFlag = False,
    **options: Any,
) -> None:
    """Upload examples, submit a fine-tune job, and print its id; or submit all jobs of a file.

    The gateway fills in defaults for omitted options; `loramill jobs show JOB` shows them.
    """
    job_options = {
        name: from_text(name, value) if isinstance(value, str) else value
        for name, value in {**options, "columns": columns, "valid_columns": valid_columns}.items()
        if value is not None
    }
    if dry:
        if file is not None or not (adapter and train):
            raise typer.BadParameter(
                "checks a single job: give TENANT/ADAPTER and --train FILE.", param_hint="--dry-run"
            )
        dry_run(adapter, train, valid, job_options, json=json)
    elif file is not None:
        if adapter or train or valid:
            raise typer.BadParameter(
                "can't be combined with TENANT/ADAPTER, --train or --valid, which the file contains.",
                param_hint="--file",
            )
        if promote:
            raise typer.BadParameter(
                "works for a single job; promote the adapters of a file with `loramill promote`.",
                param_hint="--promote",
            )
        rows = read_jobs(file, job_options)  # before any request to the gateway
        if create_tenant:
            _create_tenants({entry.adapter.tenant for entry in check_entries(rows)})
        _submit_file(file, job_options, name=name, retry=retry, wait=wait, json=json)
    elif adapter and train:
        if create_tenant:
            _create_tenants({AdapterName.parse(adapter).tenant})
        _submit_one(adapter, train, valid, job_options, wait=wait or promote, promote=promote, json=json)
    else:
        raise typer.BadParameter("give TENANT/ADAPTER and --train FILE, or --file JOBS.")


def _create_tenants(names: Collection[str]) -> None:
    """Creates the tenants that do not exist, and reports each."""
    with Client() as client:
        ordered = sorted(names)
        for start in range(0, len(ordered), MAX_TENANTS_PER_REQUEST):
            for each in client.tenants.create_many(ordered[start : start + MAX_TENANTS_PER_REQUEST], exist_ok=True):
                if each.new:
                    print_message(f"Tenant {each.name} created.")


def _submit_one(
    adapter: str, train: str, valid: str | None, options: dict[str, Any], *, wait: bool, promote: bool, json: bool
) -> None:
    with Client() as client:
        job = client.jobs.submit(adapter, train, valid=valid, on_upload=report_upload, **options)
        if not json:
            print_line(job.id)
        if wait:
            job = _wait_with_progress(client, job)
            _report_result(client, job, promote=promote)
        elif not json:
            print_message(f"Queued; `loramill jobs events -f {job.id}` follows it.")
    if json:
        print_json(job)


def _report_result(client: Client, job: Job, *, promote: bool) -> None:
    """Reports the new version and the champion; only an adapter's first version becomes champion automatically."""
    print_message(f"{job.model} is ready: `loramill chat {job.model}`")
    version = (job.model or "").partition("@")[2]
    try:
        adapter = client.adapters.promote(job.adapter, version) if promote else client.adapters.get(job.adapter)
    except Forbidden:  # a key with only the scope `training` may not read adapters
        if promote:
            raise
        return
    if short_version(adapter.champion) == version:
        print_message(f"{job.adapter} answers with it.")
    else:
        print_message(
            f"{job.adapter} still answers with its champion {short_version(adapter.champion)}; "
            f"`loramill promote {job.model}` makes the new version answer."
        )


def _submit_file(file: Path, defaults: Mapping[str, Any], *, name: str, retry: bool, wait: bool, json: bool) -> None:
    with Client() as client:
        with _progress() as progress:
            tasks: dict[str, Any] = {}

            def tell(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, total=total)
                progress.update(tasks[what], completed=done)

            found = client.jobs.submit_many(
                file, defaults=defaults, name=name, retry=retry, on_progress=tell, on_upload=report_warnings
            )
        if json and not wait:
            return print_json(found)
        new = [each for each in found if each.new]
        if not json:
            _print_submitted(found)
            before = f", {len(found) - len(new)} were submitted before" if len(new) < len(found) else ""
            print_message(f"{counted(len(new), 'job')} submitted{before}; `loramill jobs watch` shows them all.")
        if wait:
            ids = [each.job.id for each in found]
            with explain_interrupt(ids):
                jobs = watch_until_done(client, ids, quiet=json)
            if json:
                print_json(jobs)
            if any(job.failure for job in jobs):
                raise typer.Exit(1)
    return None


def _print_submitted(found: Iterable[SubmittedJob]) -> None:
    print_table(
        ("JOB", "ADAPTER", "STATUS", ""),
        (
            (each.job.id, each.job.adapter, styled_status(each.job.status), "new" if each.new else "existed")
            for each in found
        ),
        empty="",
    )


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, console=make_console(stderr=True))


def _wait_with_progress(client: Client, job: Job) -> Job:
    with _progress() as progress:
        task = progress.add_task(f"{job.adapter} {job.status}", total=job.steps)

        def advance(now: Job) -> None:
            progress.update(task, completed=now.step, description=f"{now.adapter} {now.status}")

        with explain_interrupt([job.id]):
            return client.jobs.wait(job.id, advance)
