"""Reads Parquet, Arrow, folders of `datasets` and hub datasets as rows of JSON values."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramill.data.ingest.table import Table
from loramill.errors import DatasetInvalid, InvalidRequest

if TYPE_CHECKING:
    import datasets
    import pyarrow

HUB = "hf:"
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.\[\]:%+-]+))?")
#: Rows that are converted to Python values at once.
_ROWS = 1000


class NotJson:
    """A cell, or a part of one, that JSON can't express."""

    def __init__(self, description: str) -> None:
        self.description = description


def read_parquet(name: str, raw: bytes) -> Table:
    """The rows of a Parquet file.

    Raises:
        DatasetInvalid: it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    with _translate_errors(name):
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        return _table(name, "Parquet", file.schema_arrow, file.iter_batches(_ROWS))


def read_arrow(name: str, raw: bytes) -> Table:
    """The rows of an Arrow (Feather) file.

    Raises:
        DatasetInvalid: it is damaged.
    """
    import pyarrow

    with _translate_errors(name):
        file = pyarrow.ipc.open_file(pyarrow.BufferReader(raw))
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        return _table(name, "Arrow", file.schema, batches)


def read_folder(path: Path) -> Table:
    """The rows of a folder that was written by `save_to_disk` of `datasets`.

    Raises:
        InvalidRequest: it is another kind of folder, or contains several splits.
        DatasetInvalid: it is damaged.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / "dataset_info.json").is_file())
        raise InvalidRequest(
            f"{path} has the splits {', '.join(splits)}: give one of them, such as {path / splits[0]}."
        )
    if not (path / "state.json").is_file():
        raise InvalidRequest(
            f"{path} can't be read: it is a folder that was not written by `save_to_disk` of `datasets`; give a file "
            "in it."
        )
    import datasets

    with _translate_errors(path.name):
        return _table_of_dataset(path.name, "saved dataset", datasets.load_from_disk(str(path)))


def read_hub(source: str) -> Table:
    """The rows of `hf:org/name` or `hf:org/name:split`.

    Raises:
        InvalidRequest: there is no such dataset, or the hub can't be reached.
    """
    import datasets

    found = _HUB_NAME.fullmatch(source.removeprefix(HUB))
    if found is None:
        raise InvalidRequest(f"'{source}' is not the name of a hub dataset; write hf:org/name or hf:org/name:split.")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        loaded = datasets.load_dataset(found["name"], split=found["split"] or "train")
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InvalidRequest(
            f"{source} can't be read: {reason} (Is the name right, and can the hub be reached?)"
        ) from error
    return _table_of_dataset(source, "hub dataset", loaded)


def _table_of_dataset(name: str, kind: str, loaded: datasets.Dataset) -> Table:
    # As Arrow, so that unused columns (images, audio) are not decoded.
    tables = loaded.with_format("arrow").iter(_ROWS)
    return _table(name, kind, loaded.features.arrow_schema, tables)


def _table(
    name: str, kind: str, schema: pyarrow.Schema, batches: Iterator[pyarrow.RecordBatch] | Iterator[pyarrow.Table]
) -> Table:
    columns: list[str] = schema.names
    if len(set(columns)) < len(columns):
        raise DatasetInvalid(f"{name}: two columns have the same name; rename one ({', '.join(columns)}).")
    dated = tuple(field.name for field in schema if _temporal(field.type))
    return Table(name, kind, "row", tuple(columns), _rows(name, columns, batches), dated, nulls_may_be_absent=True)


def _temporal(kind: pyarrow.DataType) -> bool:
    import pyarrow

    inner = (kind.field(index).type for index in range(kind.num_fields))
    return bool(pyarrow.types.is_temporal(kind)) or any(map(_temporal, inner))


def _rows(name: str, columns: list[str], batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _translate_errors(name):
        for batch in batches:
            cells = [batch.column(index).to_pylist() for index in range(len(columns))]
            for row in zip(*cells, strict=True):
                number += 1
                yield number, {column: as_json(cell) for column, cell in zip(columns, row, strict=True)}


def as_json(cell: Any) -> Any:
    """A cell as JSON: dates and times become text in ISO 8601, and what JSON can't express becomes `NotJson`."""
    if cell is None or isinstance(cell, str | bool | int):
        return cell
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else NotJson(f"the number {cell}")
    if isinstance(cell, datetime.date | datetime.time):  # a datetime is a date
        return cell.isoformat()
    if isinstance(cell, dict):
        return {key: as_json(value) for key, value in cell.items()}
    if isinstance(cell, list):
        return [as_json(value) for value in cell]
    return NotJson(_KINDS.get(type(cell).__name__, f"a {type(cell).__name__}"))


_KINDS = {
    "bytes": "bytes (binary); cast the column to text",
    "Decimal": "a decimal; cast the column to text",
    "tuple": "a map; write objects with fixed keys",
    "timedelta": "a span of time; cast the column to text",
}


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Turns errors of Arrow and `datasets` about a file into DatasetInvalid."""
    import pyarrow

    try:
        yield
    except (DatasetInvalid, InvalidRequest):
        raise
    except (pyarrow.ArrowException, ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetInvalid(f"{name} can't be read as a table: {reason} (Write it again, or use JSONL.)") from error
