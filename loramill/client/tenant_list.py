"""Lists of tenants to create: one name per line, CSV or TSV with a header, or JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from loramill.errors import InvalidRequest
from loramill.names import check_name
from loramill.types import FrozenModel

Quota = Annotated[int, Field(ge=0, lt=2**31, strict=True)] | Literal["unlimited"] | None
Rate = Annotated[int, Field(ge=1, lt=2**31, strict=True)] | Literal["unlimited"] | None
Tokens = Annotated[int, Field(ge=1, lt=2**53, strict=True)] | Literal["unlimited"] | None
Bytes = Annotated[int, Field(ge=0, lt=2**53, strict=True)] | Literal["unlimited"] | None
CompletionDays = Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)] | Literal["default"] | None

#: Maximum number of tenants that one request creates.
MAX_TENANTS_PER_REQUEST = 1000
#: Maximum number of problems that an error lists.
_MAX_PROBLEMS = 20


class NewTenant(FrozenModel):
    """A tenant to create. Defaults: weight 1, no limits."""

    name: str
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    max_running: Quota = None
    max_queued: Quota = None
    requests_per_minute: Rate = None
    tokens_per_minute: Tokens = None
    concurrent_requests: Rate = None
    stored_bytes: Bytes = None

    @field_validator("name")
    @classmethod
    def _valid_name(cls, name: str) -> str:
        try:
            return check_name(name, "tenant")
        except InvalidRequest as error:
            raise ValueError(error.message) from error


def read_tenants(path: Path) -> list[NewTenant]:
    """Reads a list of tenants. The suffix .csv, .tsv or .jsonl gives the format; otherwise it is one name per line.

    Columns and keys are the fields of `NewTenant`; an empty cell means the default. Blank lines and, in a list of
    names, lines that begin with # are skipped.

    Raises:
        InvalidRequest: The file can't be read or is invalid; the message gives line and field of every problem.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    readers = {".csv": _from_table, ".tsv": _from_table, ".jsonl": _from_json}
    tenants: list[NewTenant] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    for line, fields in readers.get(path.suffix.lower(), _from_names)(text, path):
        try:
            tenant = NewTenant.model_validate(fields)
        except ValidationError as error:
            problems += [f"{path}, line {line}: {_describe_problem(each)}" for each in _one_problem_per_field(error)]
            continue
        if tenant.name in lines:
            problems.append(f"{path}, line {line}: '{tenant.name}' is already on line {lines[tenant.name]}.")
        lines.setdefault(tenant.name, line)
        tenants.append(tenant)
    if problems:
        more = [f"… and {len(problems) - _MAX_PROBLEMS} more."] if len(problems) > _MAX_PROBLEMS else []
        raise InvalidRequest("\n".join([*problems[:_MAX_PROBLEMS], *more]))
    if not tenants:
        raise InvalidRequest(f"{path} contains no tenant.")
    return tenants


def _from_names(text: str, _: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"name": line.strip()}


def _from_json(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidRequest(f"{path}, line {number}: invalid JSON ({error}).") from error
        yield number, {"name": row} if isinstance(row, str) else row


def _from_table(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    header = text.lstrip().partition("\n")[0]
    separator = max(",;\t|", key=header.count) if path.suffix.lower() == ".csv" else "\t"
    rows = csv.DictReader(text.lstrip().splitlines(keepends=True), delimiter=separator, restkey="")
    skipped = text[: len(text) - len(text.lstrip())].count("\n")
    columns = [column.strip() for column in rows.fieldnames or ()]
    if unknown := [column for column in columns if column not in NewTenant.model_fields]:
        raise InvalidRequest(
            f"{path} has the column{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; allowed are "
            f"{', '.join(NewTenant.model_fields)}, of which name is required."
        )
    if "name" not in columns:
        raise InvalidRequest(f"{path} has no column 'name': its first line must name the columns.")
    rows.fieldnames = columns
    for row in rows:
        number = rows.line_num + skipped
        if "" in row:
            raise InvalidRequest(f"{path}, line {number}: the row has more cells than columns.")
        cells = {column: cell.strip() for column, cell in row.items() if cell is not None and cell.strip()}
        if cells:
            yield number, {column: _parse_number(cell) if column != "name" else cell for column, cell in cells.items()}


def _parse_number(cell: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _one_problem_per_field(error: ValidationError) -> Sequence[Any]:
    """Keeps one problem per field: pydantic reports one per alternative of a union."""
    return list({problem["loc"][:1]: problem for problem in reversed(error.errors())}.values())[::-1]


def _describe_problem(problem: Mapping[str, Any]) -> str:
    field = problem["loc"][0] if problem["loc"] else None
    prefix = f"'{field}' is {problem['input']!r}; give"
    if problem["type"] == "missing":
        text = f"'{field}' is missing."
    elif problem["type"] == "extra_forbidden":
        text = f"there is no setting '{field}'; allowed are {', '.join(NewTenant.model_fields)}."
    elif problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
    elif field is None:
        text = "the line is not an object with a name."
    elif field == "weight":
        text = f"{prefix} a number above 0."
    else:
        text = f"{prefix} {'text' if field == 'name' else 'a whole number, or unlimited'}."
    return text
