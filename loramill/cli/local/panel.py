"""Adds the commands of the panel "This machine"."""

from __future__ import annotations

import typer

from loramill.cli.local.compare import compare
from loramill.cli.local.doctor import doctor
from loramill.cli.local.settings import settings
from loramill.cli.local.up import down, join, up


def add_local_commands(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    for command in (up, down, join, doctor, settings, compare):
        app.command(rich_help_panel="This machine")(command)
