"""Reads examples in many formats and converts them to the JSONL that the gateway takes.

The formats are JSONL, JSON, CSV with any common separator, Parquet, Arrow, folders of `datasets` and hub datasets
(`hf:org/name`, `hf:org/name:split`); files may be compressed, and are recognized by their content. The same rules apply
to all of them: columns are recognized, or `columns` names them ({"prompt": "question", "completion": "answer"}); other
columns are left out with a warning; each row becomes a line. JSONL that needs no change is uploaded byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

from loramill.data import jsonl
from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.ingest.columnar import HUB, NotJson, read_arrow, read_folder, read_hub, read_parquet
from loramill.data.ingest.content import inner_suffix, read_bytes, text_of
from loramill.data.ingest.delimited import read_delimited
from loramill.data.ingest.forms import CellError, RowFormat, format_of, recognize, short_repr
from loramill.data.ingest.table import Table
from loramill.errors import DatasetInvalid

__all__ = ["HUB", "Columns", "PreparedSource", "read_source"]

#: The column of each field; "auto" and None: they are recognized.
Columns = Mapping[str, str] | Literal["auto"] | None

_DELIMITED = (".csv", ".tsv", ".tab", ".psv")
_JSON = (".jsonl", ".ndjson", ".json")
#: Problems that are listed; the rest is counted.
_MAX_LISTED = 20
#: Columns that one warning names.
_MAX_NAMED_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """A source as the gateway takes it.

    Attributes:
        name: for messages.
        content: JSONL; its lines have the numbers of the source's rows.
        recognized: what it was read as, such as "TSV, Alpaca (instruction, input, output)".
        warnings: what was left out.
    """

    name: str
    content: bytes
    format: str
    warnings: tuple[str, ...] = ()


def read_source(source: str | Path, columns: Columns = None, *, columns_optional: bool = False) -> PreparedSource:
    """Reads examples.

    Args:
        source: a path, or `hf:…`.
        columns: {field: column} where the columns don't have the names of a known form.
        if_there: use `columns` only if the source has them, and recognize its columns otherwise.

    Raises:
        InvalidRequest: the source can't be read, or `columns` makes no sense.
        DatasetInvalid: rows lack what an example needs; `problems` gives row or line (from 1) and column of each.
    """
    if str(source).startswith(HUB):
        return _Reader(read_hub(str(source)), columns, columns_optional).read(None)
    path = Path(source)
    if path.is_dir():
        return _Reader(read_folder(path), columns, columns_optional).read(None)
    raw = read_bytes(path)
    table = _open(path, raw)
    return _Reader(table, columns, columns_optional).read(
        raw if table.kind == "JSONL" and detect_kind(raw) is None else None
    )


def _open(path: Path, raw: bytes) -> Table:
    """The table in a file, by its content, and for plain text by its name."""
    kind, suffix = detect_kind(raw), inner_suffix(path)
    if kind == "parquet":
        return read_parquet(path.name, raw)
    if kind == "arrow":
        return read_arrow(path.name, raw)
    if kind not in (None, "utf-16"):
        raise DatasetInvalid(f"{path.name} is {describe_kind(kind or '')}; save it as CSV, JSONL or Parquet.")
    if suffix in (".parquet", ".arrow", ".feather"):
        raise DatasetInvalid(
            f"{path.name} can't be read as a table: its content is not what its name says; write it again."
        )
    if suffix in _DELIMITED:
        return read_delimited(path.name, text_of(path.name, raw))
    if kind is not None:
        raw = text_of(path.name, raw).encode()
    begins = raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins == b"[" and not _are_lines(raw):
        items = jsonl.iter_items(text_of(path.name, raw))
        return Table(path.name, "JSON", "row", None, enumerate(_with_file_name(path.name, items), start=1))
    if begins not in (b"{", b"[") and suffix not in _JSON:
        raise DatasetInvalid(
            f"{path.name} is in no known format: give JSONL, JSON, CSV or TSV (with that suffix) or Parquet."
        )
    if (whole := _one_object(raw)) is not None:
        return Table(path.name, "JSON", "row", None, [(1, whole)])
    return Table(path.name, "JSONL", "line", None, ((number, row) for number, row in jsonl.iter_rows(raw)))


def _are_lines(raw: bytes) -> bool:
    """Whether the first of several lines is JSON by itself."""
    first, second = islice(chain(jsonl.iter_rows(raw), repeat(None)), 2)
    if first is None or second is None:
        return False
    try:
        jsonl.parse(first[1])
    except DatasetInvalid:
        return False
    return True


def _one_object(raw: bytes) -> dict[str, Any] | None:
    """The object of a file that holds just one, on several lines; None if it holds something else."""
    first = next(jsonl.iter_rows(raw), None)
    if first is None or first[1].rstrip().endswith(b"}"):
        return None
    try:
        value = jsonl.parse(raw)
    except DatasetInvalid:
        return None
    return value if isinstance(value, dict) else None


def _with_file_name(name: str, items: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from items
    except DatasetInvalid as error:
        joint = ", " if error.message.startswith("row ") else ": "
        raise DatasetInvalid(f"{name}{joint}{error.message}") from error


class _Reader:
    """Turns a table's rows into lines, in one pass, and notes what is wrong with them."""

    def __init__(self, table: Table, columns: Columns, if_there: bool) -> None:
        self._table = table
        self._requested_columns = None if columns in (None, "auto") else columns
        self._columns_optional = if_there
        self._format: RowFormat | None = None
        self._columns: dict[str, str] = {}
        self._used: set[str] = set()
        self._ignored: dict[str, None] = {}
        self._problems: list[str] = []
        self._count = 0
        if isinstance(self._requested_columns, Mapping):
            format_of(self._requested_columns)
        if table.columns is not None:
            self._choose_format(table.columns)

    def read(self, raw: bytes | None) -> PreparedSource:
        """Converts all rows; `raw` is a JSONL source, which is returned as it is if nothing has to change."""
        lines: list[str] = []
        last, changed = 0, raw is None
        for number, row in self._table.rows:
            line, same = self._line(number, row)
            changed = changed or not same
            lines += [""] * (number - last - 1)
            lines.append(json.dumps(line, ensure_ascii=False) if line is not None else "")
            last = number
        self._refuse()
        if self._format is None:
            raise DatasetInvalid(f"{self._table.name} is empty; it has no examples.")
        content = "".join(f"{line}\n" for line in lines).encode() if changed or raw is None else raw
        return PreparedSource(self._table.name, content, self._format_description(), self._warnings())

    def _line(self, number: int, row: Any) -> tuple[dict[str, Any] | None, bool]:
        """The line for a row, None if the row is wrong; and whether the line equals the row."""
        try:
            value = jsonl.parse(row) if isinstance(row, bytes) else row
        except DatasetInvalid as error:
            self._problem(number, error.message)
            return None, False
        if not isinstance(value, dict):
            self._problem(number, f"it is {short_repr(value)}, not an object.")
            return None, False
        if self._format is None:
            self._choose_format([*value])
        self._ignored.update(dict.fromkeys(column for column in value if column not in self._used))
        try:
            line = self._convert(value)
        except CellError as wrong:
            column = self._columns.get(wrong.field, wrong.field)
            self._problem(number, wrong.problem, column)
            return None, False
        return line, line == value

    def _convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        assert self._format is not None
        cells = {field: row[column] for field, column in self._columns.items() if column in row}
        for field in self._format.required:
            if field not in cells:
                raise CellError(field, "it is missing; add it, or remove the row.")
        if self._table.nulls_may_be_absent:
            for field, value in cells.items():
                _check_json(field, value)
            cells = {field: _without_nulls(value) for field, value in cells.items()}
        return self._format.to_line(cells)

    def _choose_format(self, there: list[str] | tuple[str, ...]) -> None:
        """Decides the form by the header, or the keys of the first row."""
        name = self._table.name
        given = self._requested_columns if isinstance(self._requested_columns, Mapping) else None
        fixed = self._table.columns is not None  # a row of JSON may lack what is optional
        lost = [
            column
            for field, column in (given or {}).items()
            if column not in there and (fixed or field in format_of(given or {}).required)
        ]
        if given and lost and not self._columns_optional:
            raise DatasetInvalid(
                f"{name} has no column {', '.join(lost)}; it has {', '.join(map(str, there))}.", param="columns"
            )
        if given and not lost:
            self._format, self._columns = format_of(given), dict(given)
        else:
            self._format = recognize(name, there)
            # In JSON, a later row may have an optional field that the first lacks.
            known = there if fixed else self._format.fields
            self._columns = {field: field for field in self._format.fields if field in known}
        self._used = set(self._columns.values())

    def _problem(self, number: int, problem: str, column: str | None = None) -> None:
        self._count += 1
        if len(self._problems) < _MAX_LISTED:
            where = f"{self._table.name}, {self._table.unit} {number}" + (f", column {column}" if column else "")
            self._problems.append(f"{where}: {problem}")

    def _refuse(self) -> None:
        if not self._count:
            return
        more = f"; the first {_MAX_LISTED}" if self._count > _MAX_LISTED else ""
        plural = "problem" if self._count == 1 else "problems"
        head = f"{self._table.name} has {self._count} {plural}{more}:"
        raise DatasetInvalid("\n".join([head, *self._problems]), problems=self._problems)

    def _format_description(self) -> str:
        assert self._format is not None
        fields = [field if field == column else f"{field}={column}" for field, column in self._columns.items()]
        if self._table.columns is None and not self._requested_columns:
            fields = list(self._format.required)
        named = self._format.name if [self._format.name] == fields else f"{self._format.name} ({', '.join(fields)})"
        return f"{self._table.kind}, {named}"

    def _warnings(self) -> tuple[str, ...]:
        found = []
        if self._ignored:
            names = [short_repr(column)[1:-1] for column in self._ignored]
            more = f" and {len(names) - _MAX_NAMED_COLUMNS} more" if len(names) > _MAX_NAMED_COLUMNS else ""
            found.append(f"{self._table.name}: not used: {', '.join(names[:_MAX_NAMED_COLUMNS])}{more}.")
        if dated := [column for column in self._table.temporal_columns if column in self._used]:
            found.append(
                f"{self._table.name}: {', '.join(dated)} holds dates, which became text such as 2024-03-01T00:00:00."
            )
        return tuple(found)


def _check_json(field: str, value: Any, where: str = "it") -> None:
    """Refuses values that JSON can't express, anywhere in a cell."""
    if isinstance(value, NotJson):
        raise CellError(field, f"{where} is {value.description}.")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_json(field, item, f"{where}[{key}]")


def _without_nulls(value: Any) -> Any:
    """The value without the nulls that Arrow adds: if one message has a key, all others have it as null."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
