"""Quarantines rows that are too long to train on: one of them in a training file fails the whole job."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from loramill.data.encoding import check_tokens
from loramill.data.examples import Examples, read_row
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid
from loramill.models.catalog import Base
from loramill.pipelines.nightly.collection.rows import CheckedRows, NewRow, QuarantinedRow, quarantine
from loramill.submission.defaults import MAX_LENGTH
from loramill.submission.options import JobOptions
from loramill.types import JobSpec

#: A token is at least one byte, and what a chat template adds to a row is mostly shorter than the row's JSON: rows of
#: fewer bytes per token of the limit are not encoded, which spares most adapters the time.
_ENCODED_FROM = 0.5


def of_trainable_length(checked: CheckedRows, base: Base, job: JobSpec | None, options: JobOptions) -> CheckedRows:
    """Quarantines the rows that have more tokens than the adapter's jobs read.

    Args:
        checked: the rows.
        base: whose tokenizer counts.
        job: the champion's; None: there is none.
        options: those of nightly.yaml, which come first.
    """
    limit = options.max_length or (job.max_length if job else min(MAX_LENGTH, base.context_length))
    kept: list[NewRow] = []
    bad: list[QuarantinedRow] = []
    for row in checked.valid:
        text = row.pair or row.raw
        problem = _problem(row, text, base, limit) if len(text) > _ENCODED_FROM * limit else None
        if problem is None:
            kept.append(row)
        else:
            bad.append(quarantine(row.file, row.line, text, problem))
    return CheckedRows(tuple(kept), (*checked.bad, *bad))


def _problem(row: NewRow, text: bytes, base: Base, limit: int) -> str | None:
    """Why a row can't be trained on, as a sentence about it."""
    example = row.example if row.pair is None else read_row(text, row.line)
    try:
        check_tokens(Examples(row.file, (example,), ()), _tokenizer(base.folder), limit)
    except DatasetInvalid as error:
        return error.problems[0].removeprefix(f"{row.file}, ").partition(": ")[2]
    return None


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder)
