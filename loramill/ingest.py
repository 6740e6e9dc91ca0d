"""Examples from wherever they lie, as the JSONL that the gateway takes.

A JSONL file goes as it is. CSV files, and by `datasets` Parquet and JSON files and data sets of a hub (`hf:org/name`,
`hf:org/name:split`), are turned into JSONL, a row becoming a line. `columns` says which of their columns is what:
{"prompt": "question", "completion": "answer"}, or {"messages": "chat"}; without it they are called so already.
Other columns are left behind.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramill.errors import DatasetInvalid, InvalidRequest

if TYPE_CHECKING:
    import datasets

HUB = "hf:"
_TABLES = (".csv", ".parquet", ".json")
_FORMS = (("messages",), ("prompt", "completion"))
#: What a line may have besides.
_OPTIONAL = ("weight",)
#: Problems that are listed; the rest is counted.
_LISTED = 20

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.\[\]:%+-]+))?")


def is_table(source: str | Path) -> bool:
    """Whether a source has to be turned into JSONL."""
    return str(source).startswith(HUB) or Path(source).suffix.lower() in _TABLES


def read_source(source: str | Path, columns: Mapping[str, str] | None = None) -> tuple[str, bytes]:
    """A name for messages, and the JSONL.

    Raises:
        InvalidRequest: the source can't be read, or `columns` makes no sense.
        DatasetInvalid: a row lacks what an example needs; `problems` gives row (from 1) and column of each.
    """
    if is_table(source):
        return _read_table(str(source), columns)
    if columns:
        raise InvalidRequest(f"{source} is JSONL, which has no columns to choose from; leave 'columns' out.")
    return Path(source).name, _read(Path(source))


def _read_table(source: str, columns: Mapping[str, str] | None) -> tuple[str, bytes]:
    if Path(source).suffix.lower() == ".csv" and not source.startswith(HUB):
        name, header, rows = Path(source).name, *_csv(Path(source))
        return name, _lines(name, rows, _choose(name, header, columns))
    name = source if source.startswith(HUB) else Path(source).name
    with TemporaryDirectory(prefix="loramill-") as cache, _explained(source):
        table = _load(source, cache)
        return name, _lines(name, table, _choose(name, table.column_names, columns))


def _csv(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Header and rows. All cells are text: a code such as 007 is no number, and "NA" is an answer.

    Not by `datasets`, whose reader shifts the cells of a row that has one too many.
    """
    try:
        rows = csv.reader(io.StringIO(_read(path).decode("utf-8-sig"), newline=""), strict=True)
        header = next(rows, [])
        if not header:
            raise DatasetInvalid(f"{path.name} is empty; its first row names the columns.")
        if len(header) != len(set(header)):
            raise DatasetInvalid(f"{path.name}, row 0: a column's name stands there twice; rename one.")
        cells = [row for row in rows if row]
    except UnicodeDecodeError as error:
        raise DatasetInvalid(f"{path.name}: byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from error
    except csv.Error as error:
        raise DatasetInvalid(f"{path.name}, line {rows.line_num}: it is not CSV: {error}.") from error
    for number, row in enumerate(cells, start=1):
        if len(row) != len(header):
            raise DatasetInvalid(
                f"{path.name}, row {number}: it has {len(row)} cells where the header has {len(header)}; "
                "put quotes around a cell with a comma in it."
            )
    return header, (dict(zip(header, row, strict=True)) for row in cells)


def _load(source: str, cache: str) -> datasets.Dataset:
    """The rows; those of a file are kept nowhere, so that one that was changed is never answered as it was."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if source.startswith(HUB):
        found = _HUB_NAME.fullmatch(source.removeprefix(HUB))
        if found is None:
            raise InvalidRequest(f"'{source}' is no data set of a hub; write hf:org/name or hf:org/name:split.")
        return datasets.load_dataset(found["name"], split=found["split"] or "train")
    _read(Path(source), size=1)
    read = datasets.Dataset.from_parquet if source.lower().endswith(".parquet") else datasets.Dataset.from_json
    return read(source, cache_dir=cache)


def _choose(name: str, there: Iterable[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column of each field that a line is made of."""
    there = list(there)
    if columns:
        wanted = dict(columns)
    else:
        form = next((form for form in _FORMS if set(form) <= set(there)), None)
        if form is None:
            raise DatasetInvalid(
                f"{name} has the columns {', '.join(there)}, and neither messages nor prompt and completion: say which "
                "they are, such as columns prompt=question,completion=answer."
            )
        wanted = {field: field for field in (*form, *_OPTIONAL) if field in there}
    if not any(set(form) <= set(wanted) <= {*form, *_OPTIONAL} for form in _FORMS):
        raise InvalidRequest(
            f"The columns {', '.join(wanted)} make no example: give messages, or prompt and completion.",
            param="columns",
        )
    if lost := [column for column in wanted.values() if column not in there]:
        raise DatasetInvalid(f"{name} has no column {', '.join(lost)}; it has {', '.join(there)}.", param="columns")
    return wanted


def _lines(name: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> bytes:
    problems: list[str] = []
    count = 0
    lines = []
    for number, row in enumerate(rows, start=1):
        line = {}
        for field, column in columns.items():
            line[field], problem = _value(field, row[column])
            if problem:
                count += 1
                if len(problems) < _LISTED:
                    problems.append(f"{name}, row {number}, column {column}: {problem}")
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if count:
        more = f"; the first {_LISTED}" if count > _LISTED else ""
        plural = "problem" if count == 1 else "problems"
        raise DatasetInvalid("\n".join([f"{name} has {count} {plural}{more}:", *problems]), problems=problems)
    return "".join(lines).encode("utf-8", "surrogatepass")


def _value(field: str, cell: Any) -> tuple[Any, str | None]:
    """The value that a cell stands for, and what is wrong with it."""
    if cell is None or cell == "":
        return None, "it is empty; fill it in, or remove the row."
    if field == "weight":
        return _number(cell)
    if field != "messages":
        return cell, None if isinstance(cell, str) else f"it is {_kind(cell)}; it must be text."
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            return None, f"it is not JSON: {error}; write a list of messages."
    if not isinstance(cell, list):
        return None, f"it is {_kind(cell)}; it must be a list of messages."
    # A column has one type: where one message has a key, the others have it as null.
    return [_without_nulls(message) for message in cell], None


def _number(cell: Any) -> tuple[Any, str | None]:
    try:
        return float(cell), None
    except (TypeError, ValueError):
        return None, f"it is {_kind(cell)}; it must be a number."


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}


def _kind(cell: Any) -> str:
    text = ascii(cell)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}.") from error


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns what `datasets` raises about a source into ours; it has a class for nearly everything."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetInvalid, InvalidRequest):
        raise
    except (DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if source.startswith(HUB):
            raise InvalidRequest(f"{source} can't be read: {reason} (Is the name right, and the hub there?)") from error
        raise DatasetInvalid(
            f"{Path(source).name} can't be read as a table: {reason} (Mend it, or use JSONL.)"
        ) from error
