"""What every reader makes of a file: rows, with where each stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """Rows before anything is known of what they mean.

    Attributes:
        name: of the file, for messages.
        kind: what was read, such as "CSV separated by ';'".
        unit: what a row's number counts: "row" or "line", from 1.
        columns: the header; None where each row has its own keys.
        rows: each with its number; of JSON a row may be no object.
        dated: columns with dates or times, which become text.
        sparse: whether a null only fills the place of a key that other rows have, as in Arrow.
    """

    name: str
    kind: str
    unit: str
    columns: tuple[str, ...] | None
    rows: Iterable[tuple[int, Any]]
    dated: tuple[str, ...] = ()
    sparse: bool = False
