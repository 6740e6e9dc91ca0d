"""Lists of what is wrong with a file: a few problems in full, all of them counted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

from loramill.errors import DatasetInvalid
from loramill.plural import counted

#: Problems, or lines in one warning, that are listed; the rest is counted.
MAX_LISTED = 20


class ProblemList:
    """The problems of a file.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._listed: list[str] = []
        self._count = 0

    def add(self, problem: str, where: str = "") -> None:
        """Adds a problem; `where` is its place in the file, such as "line 3"."""
        self._count += 1
        if len(self._listed) < MAX_LISTED:
            self._listed.append(f"{self._name}{f', {where}' if where else ''}: {problem}")

    def raise_if_any(self) -> None:
        """Raises DatasetInvalid if there are problems; its `problems` are those that are listed."""
        if self._count:
            more = f"; the first {MAX_LISTED}" if self._count > MAX_LISTED else ""
            head = f"{self._name} has {counted(self._count, 'problem')}{more}:"
            raise DatasetInvalid("\n".join([head, *self._listed]), problems=self._listed)


def unit_of(filename: str) -> str:
    """What the rows of a file are called: "line" in JSONL, "row" in a table, which was converted row by row."""
    suffixes = PurePath(filename.lower()).suffixes
    return "row" if suffixes and not {".jsonl", ".ndjson"}.intersection(suffixes) else "line"


def list_first(items: Iterable[str]) -> str:
    """The first of many items, and the number of the others."""
    shown = list(items)
    more = f", and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return ", ".join(shown[:MAX_LISTED]) + more
