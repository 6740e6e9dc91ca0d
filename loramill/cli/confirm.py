"""Confirmation and summary of deletions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from loramill.cli.format import print_message
from loramill.plural import counted, listed
from loramill.types import DeletionSummary


def describe_deletion(names: Sequence[str]) -> str:
    return f"This deletes {', '.join(names)} with everything that belongs to {'them' if len(names) > 1 else 'it'}."


def confirm(sentence: str, expected: str) -> None:
    """Requires the user to type a word, and exits otherwise."""
    if not _is_interactive():
        raise typer.BadParameter("the deletion can't be confirmed without a terminal; use --yes.")
    print_message(f"{sentence} It can't be undone.", style="yellow")
    if typer.prompt(f"Type {expected} to delete", default="", show_default=False, err=True) != expected:
        print_message("Nothing was deleted.")
        raise typer.Exit(1)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def summarize_deletion(name: str, removed: DeletionSummary) -> str:
    counts = ((removed.versions, "version"), (removed.jobs, "job"), (removed.files, "file"))
    parts = [counted(count, what) for count, what in counts if count]
    open_jobs = len(removed.cancelled)
    ended = f" {counted(open_jobs, 'job')} had not ended and {'was' if open_jobs == 1 else 'were'} cancelled."
    return (f"{name} is deleted, with {listed(parts)}." if parts else f"{name} is deleted.") + ended * bool(open_jobs)
