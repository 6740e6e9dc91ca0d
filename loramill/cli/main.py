"""The root command: registers the commands and turns errors into exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loramill import __version__
from loramill.cli import (
    adapters,
    chat,
    compare,
    data,
    generate,
    jobs,
    keys,
    local,
    nightly,
    plan,
    tenants,
    usage,
)
from loramill.cli.format import print_line, print_message
from loramill.errors import LoramillError
from loramill.logs import quiet_libraries

#: Extra of loramill that installs a package; the extra `local` installs all others.
EXTRAS = {
    "datasets": "data",
    "deepspeed": "full",
    "matplotlib": "plot",
    "openai": "openai",
    "plotext": "plot",
    "pyarrow": "data",
}


class Root(TyperGroup):
    """Prints an error of loramill as one sentence and exits with 1. (Typer: 2 for wrong usage, 130 for Ctrl-C.)"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _hide_flag_types(self)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; prints an error of loramill, or the extra to install, and exits with 1."""
        try:
            return super().invoke(ctx)
        except LoramillError as error:
            print_message(error.message, style="red")
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            package = (error.name or "loramill").partition(".")[0]
            if package == "loramill":
                raise
            extra = EXTRAS.get(package, "local")
            print_message(
                f"This needs the package {package}, which is not installed: pip install 'loramill[{extra}]'.",
                style="red",
            )
            raise typer.Exit(1) from error


def _hide_flag_types(command: Any) -> None:
    """Removes the type from the help of flags, which Typer 0.29 shows as <bool>."""
    for option in command.params:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _hide_flag_types(each)


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


local.register(app)
tenants.register(app)
keys.register(app)
usage.register(app)
jobs.register(app)
plan.register(app)
adapters.register(app)
data.register(app)
chat.register(app)
generate.register(app)
nightly.register(app)
compare.register(app)


def main() -> None:
    """Entry point of the command `loramill`."""
    quiet_libraries()
    app()
