"""Recognizes the format of a table's rows and converts them to the gateway's JSONL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loramill.data import jsonl
from loramill.data.ingest.columnar import NotJson
from loramill.data.ingest.formats import CellError, RowFormat, format_of, recognize, short_repr
from loramill.data.ingest.table import Table
from loramill.data.problems import ProblemList
from loramill.errors import DatasetInvalid

#: The column of each field; "auto" and None: they are recognized.
Columns = Mapping[str, str] | Literal["auto"] | None

#: Columns that one warning names.
_MAX_NAMED_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """A source, converted to what the gateway takes.

    Attributes:
        name: its name, for messages.
        content: JSONL; its lines have the numbers of the source's rows.
        format: the recognized format, such as "TSV, Alpaca (instruction, input, output)".
        warnings: warnings about what was left out.
    """

    name: str
    content: bytes
    format: str
    warnings: tuple[str, ...] = ()


class RowReader:
    """Turns the rows of a table into lines, in one pass, and collects the problems.

    Args:
        table: the rows.
        columns: the column of each field; None and "auto": recognized.
        columns_optional: whether `columns` is used only if the table has them.

    Raises:
        InvalidRequest: `columns` makes no example.
        DatasetInvalid: the header matches no known format, or several.
    """

    def __init__(self, table: Table, columns: Columns, columns_optional: bool) -> None:
        self._table = table
        self._requested_columns = None if columns in (None, "auto") else columns
        self._columns_optional = columns_optional
        self._format: RowFormat | None = None
        self._columns: dict[str, str] = {}
        self._used: set[str] = set()
        self._ignored: dict[str, None] = {}
        self._problems = ProblemList(table.name)
        if isinstance(self._requested_columns, Mapping):
            format_of(self._requested_columns)
        if table.columns is not None:
            self._choose_format(table.columns)

    def read(self, raw: bytes | None, *, keep_bad_rows: bool = False) -> PreparedSource:
        """Converts all rows.

        Args:
            raw: a JSONL source, which is returned unchanged if no line has to change.
            keep_bad_rows: keep bad rows as they are; otherwise they are an error.
        """
        lines: list[str] = []
        last, changed = 0, raw is None
        for number, row in self._table.rows:
            line, same = self._line(number, row)
            changed = changed or not same
            lines += [""] * (number - last - 1)
            if line is not None:
                lines.append(json.dumps(line, ensure_ascii=False))
            else:
                lines.append(_as_it_is(row) if keep_bad_rows else "")
            last = number
        if not keep_bad_rows:
            self._problems.raise_if_any()
        if self._format is None:
            raise DatasetInvalid(f"{self._table.name} is empty; it has no examples.")
        content = "".join(f"{line}\n" for line in lines).encode() if changed or raw is None else raw
        return PreparedSource(self._table.name, content, self._format_description(), self._warnings())

    def _line(self, number: int, row: Any) -> tuple[dict[str, Any] | None, bool]:
        """The line for a row (None if the row is wrong), and whether it equals the row."""
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
        return self._format.convert(cells)

    def _choose_format(self, names: list[str] | tuple[str, ...]) -> None:
        """Chooses the format by the header, or by the keys of the first row."""
        name = self._table.name
        requested = self._requested_columns if isinstance(self._requested_columns, Mapping) else None
        fixed = self._table.columns is not None  # a row of JSON may lack what is optional
        missing = [
            column
            for field, column in (requested or {}).items()
            if column not in names and (fixed or field in format_of(requested or {}).required)
        ]
        if requested and missing and not self._columns_optional:
            raise DatasetInvalid(
                f"{name} has no column {', '.join(missing)}; it has {', '.join(map(str, names))}.", param="columns"
            )
        if requested and not missing:
            self._format, self._columns = format_of(requested), dict(requested)
        else:
            self._format = recognize(name, names)
            # In JSON, a later row may have an optional field that the first lacks.
            known = names if fixed else self._format.fields
            self._columns = {field: field for field in self._format.fields if field in known}
        self._used = set(self._columns.values())

    def _problem(self, number: int, problem: str, column: str | None = None) -> None:
        where = f"{self._table.unit} {number}" + (f", column {column}" if column else "")
        self._problems.add(problem, where)

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
            found.append(f"{self._table.name}: unused columns: {', '.join(names[:_MAX_NAMED_COLUMNS])}{more}.")
        if dated := [column for column in self._table.temporal_columns if column in self._used]:
            found.append(
                f"{self._table.name}: {', '.join(dated)} holds dates, which became text such as 2024-03-01T00:00:00."
            )
        return tuple(found)


def _as_it_is(row: Any) -> str:
    """A row as a line that is as wrong as the row."""
    if isinstance(row, bytes):
        return row.decode("utf-8", "backslashreplace")
    return json.dumps(row, ensure_ascii=False, default=str)


def _check_json(field: str, value: Any, where: str = "it") -> None:
    """Raises CellError if JSON can't express a value anywhere in a cell."""
    if isinstance(value, NotJson):
        raise CellError(field, f"{where} is {value.description}.")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_json(field, item, f"{where}[{key}]")


def _without_nulls(value: Any) -> Any:
    """The value without the nulls that Arrow adds: if one message has a key, all others have it too, as null."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
