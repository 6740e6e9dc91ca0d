"""`loramill submit`: submit one fine-tune job, or a file of many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramill.cli.arguments import (
    ColumnsOption,
    JsonFlag,
    OptionalTrainOption,
    ValidColumnsOption,
    ValidOption,
)
from loramill.cli.fine_tuning.dry_run import dry_run
from loramill.cli.fine_tuning.job_options import with_job_options
from loramill.cli.fine_tuning.submit_file import submit_file
from loramill.cli.fine_tuning.uploads import report_upload
from loramill.cli.fine_tuning.watch import wait_with_progress
from loramill.cli.format import print_json, print_line, print_message, short_version
from loramill.cli.tenants.create import create_missing_tenants
from loramill.client import Client
from loramill.client.models import Job
from loramill.errors import Forbidden
from loramill.names import AdapterName
from loramill.submission.options import drop_none, from_text

Adapter = Annotated[
    str | None,
    typer.Argument(
        metavar="TENANT/ADAPTER", help="Name of the adapter, such as acme/support; it is created with its first job."
    ),
]
JobFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="JOBS",
        help="Submit all jobs of a TOML, JSONL, CSV or TSV file; other options are defaults for these jobs.",
    ),
]
Name = Annotated[
    str,
    typer.Option(
        help="With --file: name of this batch. Jobs that were submitted under the same name are not submitted again."
    ),
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
    file: JobFile = None,
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
    options["sweep"] = "; ".join(options["sweep"]) if options["sweep"] else None
    job_options = {
        name: from_text(name, value) if isinstance(value, str) else value
        for name, value in drop_none({**options, "columns": columns, "valid_columns": valid_columns}).items()
    }
    if dry and (file or not adapter or not train):
        raise typer.BadParameter("checks a single job: give TENANT/ADAPTER and --train FILE.", param_hint="--dry-run")
    if file:
        _check_file_usage(bool(adapter or train or valid), promote)
        submit_file(file, job_options, name=name, retry=retry, wait=wait, create_tenants=create_tenant, json=json)
        return
    if not adapter or not train:
        raise typer.BadParameter("give TENANT/ADAPTER and --train FILE, or --file JOBS.")
    if dry:
        dry_run(adapter, train, valid, job_options, json=json)
        return
    if create_tenant:
        create_missing_tenants({AdapterName.parse(adapter).tenant})
    _submit_one(adapter, train, valid, job_options, wait=wait or promote, promote=promote, json=json)


def _check_file_usage(single: bool, promote: bool) -> None:
    """Refuses options of a single job together with --file."""
    if single:
        raise typer.BadParameter(
            "can't be combined with TENANT/ADAPTER, --train or --valid, which the file contains.", param_hint="--file"
        )
    if promote:
        raise typer.BadParameter(
            "works for a single job; promote the adapters of a file with `loramill promote`.", param_hint="--promote"
        )


def _submit_one(
    adapter: str, train: str, valid: str | None, options: dict[str, Any], *, wait: bool, promote: bool, json: bool
) -> None:
    with Client() as client:
        job = client.jobs.submit(adapter, train, valid=valid, on_upload=report_upload, **options)
        if not json:
            print_line(job.id)
        if wait:
            job = wait_with_progress(client, job)
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
