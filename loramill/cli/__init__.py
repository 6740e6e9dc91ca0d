"""The command `loramill`: one folder per panel of its help; all output goes through `format`."""

from loramill.cli.main import app, main

__all__ = ["app", "main"]
