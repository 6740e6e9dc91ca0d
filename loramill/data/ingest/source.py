"""Opens a source of examples by its content: a file, a folder of `datasets`, or a hub dataset."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from loramill.data import jsonl
from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.ingest.columnar import HUB, read_arrow, read_folder, read_hub, read_parquet
from loramill.data.ingest.content import inner_suffix, read_bytes, text_of
from loramill.data.ingest.delimited import read_delimited
from loramill.data.ingest.reader import Columns, PreparedSource, RowReader
from loramill.data.ingest.table import Table
from loramill.errors import DatasetInvalid

_DELIMITED = (".csv", ".tsv", ".tab", ".psv")
_JSON = (".jsonl", ".ndjson", ".json")


def read_source(
    source: str | Path, columns: Columns = None, *, columns_optional: bool = False, keep_bad_rows: bool = False
) -> PreparedSource:
    """Reads examples.

    Args:
        source: a path, or `hf:…`.
        columns: {field: column}, if the columns don't have the names of a known format.
        columns_optional: use `columns` only if the source has them, and recognize its columns otherwise.
        keep_bad_rows: keep rows that are incomplete or wrong as they are, for a reader that checks each line.

    Raises:
        InvalidRequest: the source can't be read, or `columns` does not make an example.
        DatasetInvalid: rows are incomplete or wrong; `problems` has the row or line (from 1) and column of each.
    """
    if str(source).startswith(HUB):
        return RowReader(read_hub(str(source)), columns, columns_optional).read(None, keep_bad_rows=keep_bad_rows)
    path = Path(source)
    if path.is_dir():
        return RowReader(read_folder(path), columns, columns_optional).read(None, keep_bad_rows=keep_bad_rows)
    raw = read_bytes(path)
    table = _open(path, raw)
    return RowReader(table, columns, columns_optional).read(
        raw if table.kind == "JSONL" and detect_kind(raw) is None else None, keep_bad_rows=keep_bad_rows
    )


def _open(path: Path, raw: bytes) -> Table:
    """Opens the table in a file, by its content, and for plain text by its name."""
    kind, suffix = detect_kind(raw), inner_suffix(path)
    if kind == "parquet":
        return read_parquet(path.name, raw)
    if kind == "arrow":
        return read_arrow(path.name, raw)
    if kind not in (None, "utf-16"):
        raise DatasetInvalid(f"{path.name} is {describe_kind(kind or '')}; save it as CSV, JSONL or Parquet.")
    if suffix in (".parquet", ".arrow", ".feather"):
        raise DatasetInvalid(
            f"{path.name} can't be read as a table: its content does not match the suffix of its name; write it again."
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
            f"{path.name} is not in a known format: give JSONL, JSON, CSV or TSV (with that suffix) or Parquet."
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
    """The object of a file that consists of one object on several lines; None for other files."""
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
