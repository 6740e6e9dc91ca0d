"""The root command, with the commands of each panel of its help."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill import __version__
from loramill.cli.adapters.panel import add_adapter_commands
from loramill.cli.fine_tuning.panel import add_fine_tuning_commands
from loramill.cli.format import print_line
from loramill.cli.groups import Root
from loramill.cli.local.panel import add_local_commands
from loramill.cli.tenants.panel import add_tenant_commands
from loramill.logs import quiet_libraries

app = typer.Typer(cls=Root, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(requested: bool) -> None:
    if requested:
        print_line(f"loramill {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune and serve one base model for many tenants, one adapter each.

    Commands call the gateway at LORAMILL_URL (default: this machine's) with the
    API key LORAMILL_API_KEY (default: the admin key that `loramill up` created).
    """


add_local_commands(app)
add_tenant_commands(app)
add_fine_tuning_commands(app)
add_adapter_commands(app)


def main() -> None:
    """Entry point of the command `loramill`."""
    quiet_libraries()
    app()
