"""Output of the commands: results go to stdout as tables or JSON, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loramill.names import SHORT_HASH_LENGTH
from loramill.plural import counted

Cell = str | Text

_STYLES = {
    "succeeded": "green",
    "ok": "green",
    "promoted": "green",
    "running": "cyan",
    "failed": "red",
    "error": "red",
    "cancelled": "yellow",
    "warn": "yellow",
    "held": "yellow",
    "rejected": "red",
    "awaiting": "yellow",
    "paused": "yellow",
}
_AGO_UNITS = ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h"), (30 * 86400, 86400, "d"))


def make_console(*, stderr: bool = False) -> Console:
    """Returns a console without markup that does not cut lines written to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def progress_bar() -> Progress:
    """Returns a progress bar on stderr: what is done, of how many, and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, console=make_console(stderr=True))


def print_message(sentence: str, style: str | None = None) -> None:
    """Prints a sentence for the user to stderr."""
    make_console(stderr=True).print(_escaped(sentence), style=style, soft_wrap=True)


def print_line(text: str) -> None:
    """Prints a result to stdout unchanged."""
    typer.echo(text)


def print_json(value: BaseModel | Iterable[BaseModel]) -> None:
    """Prints an object, or a list of objects, as JSON to stdout."""
    if isinstance(value, BaseModel):
        typer.echo(value.model_dump_json(indent=2))
    else:
        typer.echo(json.dumps([each.model_dump(mode="json") for each in value], indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], empty: str) -> None:
    """Prints a table to stdout, or the message `empty` to stderr if it has no rows."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, no_wrap=number == 0, overflow="fold")  # a truncated id is useless
    for row in rows:
        grid.add_row(*map(_escaped, row))
    if grid.row_count:
        make_console().print(grid)
    else:
        print_message(empty)


def print_fields(pairs: Iterable[tuple[str, Cell]]) -> None:
    """Prints one name and value per line to stdout."""
    grid = Table.grid(padding=(0, 2))
    for name, value in pairs:
        grid.add_row(Text(name, style="bold"), _escaped(value))
    make_console().print(grid)


def styled_status(word: str) -> Text:
    """Colors a status; its first word decides."""
    return Text(word, style=_STYLES.get(word.partition(" ")[0], ""))


def exact_size(number: int) -> str:
    """Formats a number of bytes exactly: "1 GB", "1.5 MB", "1,234,567 bytes"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit and number * 100 % unit == 0:
            return f"{number / unit:,.10g} {name}"
    return counted(number, "byte")


def escape_control_characters(text: str) -> str:
    """Escapes control characters of untrusted text, which could move the cursor, as \\x1b; newlines and tabs stay."""
    return "".join(
        repr(letter)[1:-1]
        if unicodedata.category(letter) in ("Cc", "Cf") and letter not in "\n\t\u200c\u200d"
        else letter
        for letter in text
    )


def _escaped(cell: Cell) -> Cell:
    """A text as it may be printed: names of files and reasons of errors can contain what a tenant wrote."""
    return escape_control_characters(cell) if isinstance(cell, str) else cell


def short_version(version: str | None) -> str:
    """Shortens the hash of a version for display."""
    return version[:SHORT_HASH_LENGTH] if version else "-"


def rounded_size(count: int) -> str:
    """Formats a rounded number of bytes: "512 B", "1.5 kB", "20.3 MB"."""
    if count < 1000:
        return f"{count} B"
    unit = next(unit for unit in (3, 2, 1) if count >= 1000**unit or unit == 1)
    return f"{count / 1000**unit:.1f} {(None, 'kB', 'MB', 'GB')[unit]}"


def local_time(then: float) -> str:
    """Formats a time (seconds since the epoch) in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))


def local_minute(then: float) -> str:
    """Formats a time (seconds since the epoch) in local time, without seconds."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))


def time_ago(then: float, now: float | None = None) -> str:
    """Formats a time (seconds since the epoch) relative to now: "3 min ago"; a date if older than a month."""
    passed = max(0.0, (time.time() if now is None else now) - then)
    for below, unit, name in _AGO_UNITS:
        if passed < below:
            return f"{passed / unit:.0f} {name} ago" if passed >= 1 else "just now"
    return time.strftime("%Y-%m-%d", time.localtime(then))


def four_digits(value: float) -> str:
    """Formats a measurement to four digits: "4.233", "0.001", "1234", "1.2e-05"."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
