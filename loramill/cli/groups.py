"""Command groups: the root, which turns errors into exit codes, and groups with a default command."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from loramill.cli.format import print_message
from loramill.errors import LoramillError
from loramill.extras import install_command


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
            print_message(
                f"This needs the package {package}, which is not installed: {install_command(package)}.", style="red"
            )
            raise typer.Exit(1) from error


class ListByDefault(TyperGroup):
    """A command group that lists by default: `loramill jobs --json` is `loramill jobs list --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Inserts `list` if no command is given, except during shell completion."""
        if not ctx.resilient_parsing and (not args or (args[0].startswith("-") and args[0] != "--help")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def _hide_flag_types(command: Any) -> None:
    """Removes the type from the help of flags, which Typer 0.29 shows as <bool>."""
    for option in command.params:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _hide_flag_types(each)
