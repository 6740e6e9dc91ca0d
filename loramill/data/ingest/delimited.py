"""Reads CSV with any common separator. All cells are text: 007 may be a code, and "NA" an answer."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from loramill.data.ingest.table import Table
from loramill.data.jsonl import MAX_LINE
from loramill.errors import DatasetInvalid

#: Separators, the most common first, and the description of a file with each.
_SEPARATORS = {
    ",": "CSV",
    ";": "CSV separated by ';'",
    "\t": "TSV (separated by tabs)",
    "|": "CSV separated by '|'",
}
#: Number of rows that decide between separators if several split the header.
_SAMPLE = 100


def read_delimited(name: str, text: str) -> Table:
    """The rows below the header; each must have as many cells as the header.

    Raises:
        DatasetInvalid: it is empty or not CSV, the header lacks or repeats a name, or a row has more or fewer cells.
    """
    _allow_long_cells()
    separator = separator_of(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [cell.strip() for cell in next(filter(None, reader), [])]
        cells = [row for row in reader if row]
    except csv.Error as error:
        raise DatasetInvalid(
            f"{name}, line {reader.line_num}: it is not {_SEPARATORS[separator]}: {error}; "
            'put quotes around the whole cell, and write a quote within it twice ("").'
        ) from error
    _check_header(name, header)
    for number, row in enumerate(cells, start=1):
        if len(row) != len(header):
            raise DatasetInvalid(
                f"{name}, row {number}: it has {len(row)} cells where the header has {len(header)} (separated by "
                f"{_separator_name(separator)}); put quotes around a cell with {_separator_name(separator)} in it."
            )
    rows = ((number, dict(zip(header, row, strict=True))) for number, row in enumerate(cells, start=1))
    return Table(name, _SEPARATORS[separator], "row", tuple(header), rows)


def separator_of(text: str) -> str:
    """The separator that splits the header and the rows into equally many cells; by default a comma."""
    counts = {separator: _counts(text, separator) for separator in _SEPARATORS}
    splitting = {separator: found for separator, found in counts.items() if found and found[0] > 1}
    even = [separator for separator, found in splitting.items() if set(found) == {found[0]}]
    return max(even or splitting or ",", key=lambda separator: counts[separator][:1])


def read_cells(text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """The rows of a small table of options, each with the number of its last line.

    Raises:
        DatasetInvalid: as `read_delimited`; the message names no file.
    """
    _allow_long_cells()
    separator = separator_of(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    try:
        for row in filter(None, reader):
            if not header:
                header = [cell.strip() for cell in row]
                _check_header("it", header)
            elif len(row) != len(header):
                raise DatasetInvalid(f"line {reader.line_num} has a different number of cells than the header")
            else:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DatasetInvalid(f"line {reader.line_num} is not CSV: {error}") from error


def _counts(text: str, separator: str) -> list[int]:
    """The number of cells of each of the first rows, split by a separator; -1 if a row can't be split."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found: list[int] = []
    try:
        for row in islice(filter(None, reader), _SAMPLE):
            found.append(len(row))
    except csv.Error:
        found.append(-1)
    return found


def _check_header(name: str, header: Iterable[str]) -> None:
    seen: set[str] = set()
    for number, column in enumerate(header, start=1):
        if not column:
            raise DatasetInvalid(
                f"{name}: column {number} of the header has no name; give it one (pandas writes its index so: "
                "to_csv(…, index=False) leaves that out)."
            )
        if column in seen:
            raise DatasetInvalid(f"{name}: the header has the column '{column}' twice; rename one.")
        seen.add(column)
    if not seen:
        raise DatasetInvalid(f"{name} is empty; its first row names the columns.")


def _separator_name(separator: str) -> str:
    return {"\t": "tabs", ",": "commas"}.get(separator, f"'{separator}'")


def _allow_long_cells() -> None:
    """Raises the limit of the csv module, which is 131,072 characters, for the whole process."""
    csv.field_size_limit(max(MAX_LINE, csv.field_size_limit()))
