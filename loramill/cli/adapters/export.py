"""`loramill adapters export`: download a version."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loramill.cli.arguments import FolderOption
from loramill.cli.format import make_console, print_message
from loramill.client import Client
from loramill.names import ModelName

Model = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@VERSION]",
        help="Adapter, optionally with an alias or version. Default: the champion.",
        show_default=False,
    ),
]


def export(
    name: Model,
    to: FolderOption,
    full: Annotated[bool, typer.Option("--full", help="Download the complete weights of a full fine-tune.")] = False,
) -> None:
    """Download a version as a folder that PEFT, vLLM and `loramill generate` load.

    Each file is verified against its stored hash. If an error occurs, no folder is left behind.
    """
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = make_console(stderr=True)
    with (
        Client() as client,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        task = progress.add_task("", total=None)
        version = client.adapters.export(
            name, to, full=full, on_bytes=lambda received, total: progress.update(task, completed=received, total=total)
        )
    adapter = ModelName.parse(name).adapter
    assert adapter is not None  # otherwise `export` raised
    print_message(f"{adapter.at(version)} is in {to}.")
    if full:
        print_message(f"`loramill up --base {to}` serves it as a base.")
