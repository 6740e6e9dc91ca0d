"""`loramill data` and `loramill files`: examples for nightly runs, and uploaded files."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.text import Text

from loramill.cli.adapters import Adapter
from loramill.cli.format import (
    JsonFlag,
    ListByDefault,
    local_time,
    print_fields,
    print_json,
    print_message,
    print_table,
    rounded_size,
    styled_status,
    time_ago,
)
from loramill.cli.jobs import Tenant
from loramill.cli.submit import Columns, Valid, ValidColumns, report_upload
from loramill.client import Client
from loramill.errors import first_lines
from loramill.submission.options import columns_of
from loramill.types import AdapterData

data = typer.Typer(help="Add and list the examples that nightly runs train an adapter on.", no_args_is_help=True)
files = typer.Typer(cls=ListByDefault, help="List, show and delete uploaded files of examples. Default: list.")

Train = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Examples to train on: JSONL, JSON, CSV, TSV, Parquet, Arrow, hf:org/name, or an uploaded file's id.",
        show_default=False,
    ),
]
FileId = Annotated[str, typer.Argument(metavar="FILE", help="Id of an uploaded file (file-…).", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(data, name="data", rich_help_panel="Adapters")
    app.add_typer(files, name="files", rich_help_panel="Fine-tuning")


@data.command("add")
def add_data(
    name: Adapter,
    train: Train,
    valid: Valid = None,
    columns: Columns = None,
    valid_columns: ValidColumns = None,
) -> None:
    """Upload new examples, in any format of `loramill submit`, for the next nightly run."""
    with Client() as client:
        waiting = client.adapters.add_data(
            name,
            train,
            valid=valid,
            columns=columns_of("columns", columns),
            valid_columns=columns_of("valid_columns", valid_columns),
            on_upload=report_upload,
        )
    print_message(f"{name}: {waiting.outlook}", style=None if waiting.enough else "yellow")
    if waiting.enough:
        print_message("`loramill nightly run` starts one now.")


@data.command("list")
def list_data(name: Adapter, json: JsonFlag = False) -> None:
    """List an adapter's data for nightly runs: waiting, used, or failed."""
    with Client() as client:
        found = client.adapters.list_data(name)
    if json:
        return print_json(found)
    return print_table(
        ("FILE", "NAME", "EXAMPLES", "VALIDATION", "ADDED", "STATE"),
        (
            (
                each.train,
                each.train_filename,
                str(each.train_examples),
                each.valid_filename or "-",
                time_ago(each.created_at),
                _format_state(each),
            )
            for each in found
        ),
        empty=f"{name} has no data for nightly runs: `loramill data add {name} --train FILE` adds some.",
    )


@files.command("list")
def list_files(tenant: Tenant = None, json: JsonFlag = False) -> None:
    """List uploaded files, newest first."""
    with Client() as client:
        found = [*client.files.list(tenant)]
    if json:
        return print_json(found)
    return print_table(
        ("FILE", "TENANT", "NAME", "EXAMPLES", "SIZE", "CREATED"),
        (
            (
                each.id,
                each.tenant or "-",
                each.filename,
                "-" if each.examples is None else str(each.examples),
                rounded_size(each.bytes),
                time_ago(each.created_at),
            )
            for each in found
        ),
        empty="No files yet: `loramill submit` and `loramill data add` upload them.",
    )


@files.command("show")
def show_file(
    file: FileId,
    content: Annotated[
        bool, typer.Option("--content", help="Print the content of the file instead of its description.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show a file's description, or its content: the JSONL that the upload was converted to."""
    with Client() as client:
        if content:
            for part in client.files.content(file):
                sys.stdout.buffer.write(part)
            return None
        found = client.files.get(file)
    if json:
        return print_json(found)
    return print_fields(
        [
            ("file", found.id),
            ("name", found.filename),
            ("tenant", found.tenant or "-"),
            ("examples", "-" if found.examples is None else str(found.examples)),
            ("size", rounded_size(found.bytes)),
            ("created", local_time(found.created_at)),
        ]
    )


@files.command("delete")
def delete_files(
    file: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Ids of uploaded files (file-…).", show_default=False)
    ],
) -> None:
    """Delete uploaded files. A file that an unfinished job or the next nightly run needs is kept."""
    with Client() as client:
        for each in file:
            client.files.delete(each)
            print_message(f"{each} is deleted.")


def _format_state(data: AdapterData) -> Text:
    if data.run is None:
        return styled_status("waiting")
    if data.set_aside is not None:
        reason = first_lines(data.set_aside)
        return styled_status(f"failed in {data.run}: {reason} (`loramill nightly retry {data.adapter}`)")
    return Text(f"in {data.run}" if data.used_at is None else f"used {time_ago(data.used_at)}")
