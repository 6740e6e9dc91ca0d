"""The rows of a source, as every reader returns them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """Rows before their format is recognized.

    Attributes:
        name: of the file, for messages.
        kind: the kind of file, such as "CSV separated by ';'".
        unit: what row numbers count, from 1: "row" or "line".
        columns: the header; None where each row has its own keys.
        rows: rows with their numbers; a row of JSON may be any value.
        temporal_columns: columns with dates or times, which become text.
        nulls_may_be_absent: whether a null may mean that only other rows have the key, as in Arrow.
    """

    name: str
    kind: str
    unit: str
    columns: tuple[str, ...] | None
    rows: Iterable[tuple[int, Any]]
    temporal_columns: tuple[str, ...] = ()
    nulls_may_be_absent: bool = False
