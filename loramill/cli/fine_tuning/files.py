"""`loramill files`: uploaded files of examples."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loramill.cli.arguments import JsonFlag, TenantOption
from loramill.cli.format import local_time, print_fields, print_json, print_message, print_table, rounded_size, time_ago
from loramill.client import Client

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="ID of an uploaded file (file-…).", show_default=False)
]


def list_files(tenant: TenantOption = None, json: JsonFlag = False) -> None:
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


def show_file(
    file: FileArgument,
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


def delete_files(
    file: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="IDs of uploaded files (file-…).", show_default=False)
    ],
) -> None:
    """Delete uploaded files. A file that an unfinished job or the next nightly run needs is kept."""
    with Client() as client:
        for each in file:
            client.files.delete(each)
            print_message(f"{each} is deleted.")
