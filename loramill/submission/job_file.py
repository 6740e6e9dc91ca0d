"""Reads files of jobs: hundreds of jobs, each with its adapter, data and options.

A file of jobs is TOML (one `[[jobs]]` table per job), JSONL (one object per line), CSV or TSV (one row per job; the
header names the options). A job has an `adapter` (tenant/adapter), `train`, optionally `valid`, `columns` and
`valid_columns`, and any of `JobOptions`. `[defaults]` (in JSONL a line {"defaults": {...}}) applies to every job that
does not override it. Paths are relative to the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loramill.data import jsonl
from loramill.data.ingest import HUB, Columns
from loramill.data.ingest.content import read_bytes, text_of
from loramill.data.ingest.delimited import read_cells
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.names import AdapterName
from loramill.plural import counted
from loramill.submission.options import JobOptions, from_text, parsed, read_options

#: A row with its place in the file, for messages.
LabeledRow = tuple[str, dict[str, object]]

_COLUMNS = ("columns", "valid_columns")
_DATA = ("adapter", "train", "valid", *_COLUMNS)


@dataclass(frozen=True, slots=True)
class JobFileEntry:
    """A job of the file; `where` is its place in the file, for messages."""

    where: str
    adapter: AdapterName
    train: Any
    valid: Any
    columns: Columns
    valid_columns: Columns
    options: JobOptions


def read_jobs(path: Path, defaults: Mapping[str, object]) -> list[LabeledRow]:
    """The rows of a file of jobs, each with the defaults; `defaults` win over the defaults of the file.

    Raises:
        InvalidRequest: the file can't be read in the format of its suffix.
    """
    readers: dict[str, Callable[[str], list[LabeledRow]]] = {
        ".toml": _toml,
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidRequest(
            f"{path.name} is not a file of jobs; its name must end in .toml, .jsonl, .csv or .tsv.", param="file"
        )
    text = text_of(path.name, read_bytes(path))
    try:
        rows = reader(text)
    except ValueError as error:
        raise InvalidRequest(f"{path.name} can't be read: {error}.") from error
    except DatasetInvalid as error:
        raise InvalidRequest(f"{path.name} can't be read: {error.message}") from error
    own = next((row for where, row in rows if not where), {})
    found = [(f"{path.name}, {where}", {**own, **defaults, **row}) for where, row in rows if where]
    if not found:
        raise InvalidRequest(f"{path.name} contains no jobs.", param="file")
    return [(where, _resolve_paths(path.parent, row)) for where, row in found]


def check_entries(rows: Iterable[tuple[str, Mapping[str, object]]]) -> list[JobFileEntry]:
    """The jobs of the rows.

    Raises:
        InvalidRequest: an adapter's name, a file or an option of any row is wrong; the message has a line for each.
    """
    entries: list[JobFileEntry] = []
    problems: list[str] = []
    for where, row in rows:
        wrong = _missing(row)
        try:
            columns, valid_columns = (cast(Columns, parsed(name, row.get(name))) for name in _COLUMNS)
            options = read_options({name: value for name, value in row.items() if name not in _DATA})
        except InvalidRequest as error:
            wrong += error.message.split("\n")
        try:
            adapter = AdapterName.parse(str(row.get("adapter", "tenant/adapter")))
        except InvalidRequest as error:
            wrong.append(error.message)
        problems += [f"{where}: {problem}" for problem in wrong]
        if not wrong:
            entries.append(
                JobFileEntry(where, adapter, row["train"], row.get("valid"), columns, valid_columns, options)
            )
    raise_problems(problems)
    return entries


def raise_problems(problems: Sequence[str], submitted: int = 0) -> None:
    """Raises InvalidRequest if there are problems; `submitted` is the number of jobs that were submitted before."""
    if problems:
        what = f"{counted(submitted, 'job')} submitted, the others not" if submitted else "nothing was submitted"
        raise InvalidRequest("\n".join([f"{counted(len(problems), 'problem')}; {what}:", *problems]))


def request_body(entry: JobFileEntry, train: str, valid: str | None, model: str, name: str) -> dict[str, Any]:
    """The body of the request for a job, with a key of its content by which a second submission is recognized."""
    request = {
        "model": model,
        "tenant": entry.adapter.tenant,
        "suffix": entry.adapter.adapter,
        "training_file": train,
        **({"validation_file": valid} if valid else {}),
        **entry.options.to_request(),
    }
    key = hashlib.sha256(json.dumps([name, request], sort_keys=True).encode()).hexdigest()
    return {**request, "metadata": {**(entry.options.metadata or {}), "loramill_key": key}}


def _missing(row: Mapping[str, object]) -> list[str]:
    wrong = [f"{name} is missing." for name in ("adapter", "train") if not row.get(name)]
    for name in ("train", "valid"):
        source = row.get(name)
        if isinstance(source, str | Path) and _is_path(source) and not Path(source).exists():
            wrong.append(f"{name}: there is no file {source}.")
    for name in _COLUMNS:
        columns = row.get(name)
        if columns is not None and not isinstance(columns, str) and not _are_texts(columns):
            wrong.append(f"{name}: give the column of each field, such as prompt=question,completion=answer, or auto.")
    return wrong


def _are_texts(columns: object) -> bool:
    return isinstance(columns, Mapping) and all(isinstance(text, str) for pair in columns.items() for text in pair)


def _is_path(source: str | Path) -> bool:
    return not str(source).startswith((HUB, "file-"))


def _resolve_paths(folder: Path, row: dict[str, object]) -> dict[str, object]:
    paths = {name: row[name] for name in ("train", "valid") if isinstance(row.get(name), str)}
    return {**row, **{name: str(folder / str(path)) for name, path in paths.items() if _is_path(str(path))}}


def _toml(text: str) -> list[LabeledRow]:
    content = tomllib.loads(text)
    jobs, defaults = content.pop("jobs", []), content.pop("defaults", {})
    if content or not isinstance(jobs, list) or not isinstance(defaults, dict):
        raise ValueError("it may have [defaults] and [[jobs]], and nothing else")
    lines = [number for number, line in enumerate(text.split("\n"), 1) if re.match(r"\s*\[\[\s*jobs\s*\]\]", line)]
    named = (
        [f"line {line}" for line in lines] if len(lines) == len(jobs) else [f"job {i + 1}" for i in range(len(jobs))]
    )
    return [("", defaults), *zip(named, jobs, strict=True)]


def _jsonl(text: str) -> list[LabeledRow]:
    rows: list[LabeledRow] = []
    for number, line in jsonl.iter_rows(text.encode()):
        try:
            row = jsonl.parse(line)
        except DatasetInvalid as error:
            raise ValueError(f"line {number}: {error.message.removesuffix('.')}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        rows.append(("", row["defaults"]) if [*row] == ["defaults"] else (f"line {number}", row))
    return rows


def _csv(text: str) -> list[LabeledRow]:
    return [
        (f"line {number}", {name: from_text(name, cell) for name, cell in row.items() if cell.strip()})
        for number, row in read_cells(text)
    ]
