"""The command `loramill`: one module per noun; all output goes through `format`."""

from loramill.cli.main import app, main

__all__ = ["app", "main"]
