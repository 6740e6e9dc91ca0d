"""The command `loramill`: a module a noun, and `show` for all that is printed."""

from loramill.cli.main import app, main

__all__ = ["app", "main"]
