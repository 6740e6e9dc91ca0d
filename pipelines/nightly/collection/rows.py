"""Reads the rows of new data one by one; a row that is not a valid example is quarantined with its reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loramill.data import jsonl
from loramill.data.conversation import LineError
from loramill.data.examples import Example, read_row
from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.preferences import DataKind
from loramill.data.problems import unit_of
from loramill.errors import DatasetInvalid
from loramill.pipelines.nightly.collection.preferences import better_row
from loramill.plural import counted
from loramill.types import FrozenModel

#: Reasons that a message and the step of a run list.
LISTED_REASONS = 5
#: A field at the beginning of a problem: "messages[1].content is empty; …".
_FIELD = re.compile(r"(?!it |the )([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*) ")

RowFormat = tuple[DataKind, bool]


@dataclass(frozen=True, slots=True)
class NewRow:
    """A valid row of a file.

    Attributes:
        raw: the row; of a preference pair, the prompt with the better answer.
        validation: the file is a validation file.
        pair: the preference pair that the row is of; None: it is an example.
    """

    file: str
    line: int
    raw: bytes
    example: Example
    validation: bool = False
    pair: bytes | None = None


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file of new data; `dataset` is its ID."""

    name: str
    content: bytes
    validation: bool = False
    dataset: str = ""


class QuarantinedRow(FrozenModel):
    """A row that is not used.

    Attributes:
        field: the field that is wrong; None if it is the whole row.
        row: its text.
    """

    file: str
    line: int
    field: str | None
    reason: str
    row: str

    def __str__(self) -> str:
        return f"{self.file}, {unit_of(self.file)} {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The valid rows of files, and the others."""

    valid: tuple[NewRow, ...]
    bad: tuple[QuarantinedRow, ...]


def check_rows(files: Iterable[NewFile]) -> CheckedRows:
    """Reads every row of files.

    Raises:
        DatasetInvalid: a file is not text.
    """
    valid: list[NewRow] = []
    bad: list[QuarantinedRow] = []
    for file in files:
        if (kind := detect_kind(file.content)) is not None:
            raise DatasetInvalid(f"{file.name} is {describe_kind(kind)}, not JSONL in UTF-8.")
        for line, row in jsonl.iter_rows(file.content):
            try:
                example = read_row(row, line)
            except LineError as error:
                bad.append(quarantine(file.name, line, row, str(error)))
                continue
            if example.kind == "supervised":
                valid.append(NewRow(file.name, line, row, example, file.validation))
            elif (better := better_row(row)) is not None:
                valid.append(NewRow(file.name, line, better, read_row(better, line), file.validation, row))
            else:
                reason = (
                    "it is an answer with a label, which nightly runs do not train on; write a better and a worse "
                    "answer as prompt, chosen and rejected."
                )
                bad.append(quarantine(file.name, line, row, reason))
    return CheckedRows(tuple(valid), tuple(bad))


def of_one_format(checked: CheckedRows, trained: RowFormat | None) -> CheckedRows:
    """Quarantines the rows of another format than the others, since a job takes one format.

    Args:
        checked: the rows.
        trained: the format of the data that the adapter was trained on; None: that of most new rows.
    """
    formats = Counter(row.example.format for row in checked.valid)
    if not formats:
        return checked
    expected = trained or max(sorted(formats), key=lambda each: formats[each])
    kept = tuple(row for row in checked.valid if row.example.format == expected)
    is_chat = expected[1]
    reason = (
        "it has prompt and completion, but the adapter's other examples have messages; use one format."
        if is_chat
        else "it has messages, but the adapter's other examples have prompt and completion; use one format."
    )
    others = [
        quarantine(row.file, row.line, row.raw, reason) for row in checked.valid if row.example.format != expected
    ]
    return CheckedRows(kept, (*checked.bad, *others))


def check_files(files: Sequence[NewFile], min_pairs: int) -> tuple[CheckedRows, list[str]]:
    """Reads every row of files, except those of files of preference pairs alone that wait for others.

    Args:
        files: the files.
        min_pairs: with fewer pairs in all files together, and with other rows, training files of pairs alone wait.

    Returns:
        The rows, and the IDs of the datasets that wait.

    Raises:
        DatasetInvalid: a file is not text.
    """
    found = [(file, check_rows([file])) for file in files]
    pairs = [row.pair is not None for _, each in found for row in each.valid]
    waiting = []
    if 0 < sum(pairs) < min_pairs and not all(pairs):
        alone = [file for file, each in found if each.valid and all(row.pair is not None for row in each.valid)]
        waiting = [file.dataset for file in alone if not file.validation]
    kept = [each for file, each in found if file.dataset not in waiting]
    valid, bad = [row for each in kept for row in each.valid], [row for each in kept for row in each.bad]
    return CheckedRows(tuple(valid), tuple(bad)), waiting


def too_few_pairs(checked: CheckedRows, minimum: int) -> str | None:
    """Why preference pairs wait for others, where all rows are pairs; None if they do not."""
    pairs = len(checked.valid)
    if not pairs or pairs >= minimum or any(row.pair is None for row in checked.valid):
        return None
    return f"{counted(pairs, 'preference pair')}, and feedback.min_pairs is {minimum}: add others."


def with_enough_pairs(checked: CheckedRows, minimum: int) -> CheckedRows:
    """Quarantines preference pairs if there are fewer than `minimum`."""
    pairs = [row for row in checked.valid if row.pair is not None]
    if not pairs or len(pairs) >= minimum:
        return checked
    reason = f"it is one of {counted(len(pairs), 'preference pair')}, and feedback.min_pairs is {minimum}; add others."
    few = [quarantine(row.file, row.line, row.pair or row.raw, reason) for row in pairs]
    return CheckedRows(tuple(row for row in checked.valid if row.pair is None), (*checked.bad, *few))


def check_share(checked: CheckedRows, maximum: float) -> None:
    """Raises if too many rows are bad.

    Raises:
        DatasetInvalid: the share of bad rows is above `maximum`.
    """
    total = len(checked.valid) + len(checked.bad)
    if len(checked.bad) > maximum * total:
        reasons = list_reasons(checked.bad)
        raise DatasetInvalid(
            "\n".join(
                [
                    f"{len(checked.bad)} of {counted(total, 'row')} are bad, more than {maximum:.0%}; the first:",
                    *reasons,
                ]
            ),
            problems=reasons,
        )


def list_reasons(bad: Sequence[QuarantinedRow]) -> list[str]:
    """The first reasons, each with its file and line."""
    return [str(row) for row in bad[:LISTED_REASONS]]


def quarantine_file(bad: Sequence[QuarantinedRow]) -> bytes:
    """Quarantined rows as JSONL, for download."""
    return b"".join(json.dumps(row.model_dump(), ensure_ascii=False).encode() + b"\n" for row in bad)


def quarantine(file: str, line: int, row: bytes, reason: str) -> QuarantinedRow:
    found = _FIELD.match(reason)
    text = row.decode("utf-8", "backslashreplace")
    return QuarantinedRow(file=file, line=line, field=found[1] if found else None, reason=reason, row=text)
