"""What every reader returns for a file: its rows and their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """Rows before their form is recognized.

    Attributes:
        name: of the file, for messages.
        kind: what was read, such as "CSV separated by ';'".
        unit: what a row's number counts: "row" or "line", from 1.
        columns: the header; None where each row has its own keys.
        rows: each with its number; a row of JSON may be any value.
        dated: columns with dates or times, which become text.
        sparse: whether a null may only mean that other rows have the key, as in Arrow.
    """

    name: str
    kind: str
    unit: str
    columns: tuple[str, ...] | None
    rows: Iterable[tuple[int, Any]]
    temporal_columns: tuple[str, ...] = ()
    nulls_may_be_absent: bool = False
