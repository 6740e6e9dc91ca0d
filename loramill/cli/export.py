"""`loramill adapters export`: a version's files on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loramill.cli.format import make_console, print_message
from loramill.client import Client
from loramill.names import ModelName

Model = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@VERSION]", help="The champion, or another alias or version.", show_default=False
    ),
]
To = Annotated[
    Path, typer.Option("--to", metavar="FOLDER", help="Written there; must not be there yet.", show_default=False)
]


def export(
    name: Model,
    to: To,
    full: Annotated[bool, typer.Option("--full", help="The whole weights of a full fine-tune.")] = False,
) -> None:
    """Download a version as a folder that PEFT, vLLM and `loramill generate` load.

    Every file is compared with the hash that it was stored under; the folder is there wholly or not at all.
    """
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = make_console(stderr=True)
    with (
        Client() as client,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        task = progress.add_task("", total=None)
        version = client.adapters.export(
            name, to, full=full, on_bytes=lambda come, total: progress.update(task, completed=come, total=total)
        )
    adapter = ModelName.parse(name).adapter
    assert adapter is not None  # or `export` had refused it
    print_message(f"{adapter.at(version)} is in {to}.")
    if full:
        print_message(f"Serve it as a base of its own with `loramill up --base {to}`.")
