"""Checks of datasets against jobs, with a cache: a dataset never changes, and is often submitted many times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from loramill.data.encoding import check_tokens
from loramill.data.examples import Examples, compare_splits, read_examples, row_format
from loramill.data.jsonl import iter_rows
from loramill.data.preferences import DataKind
from loramill.data.tokenizer import ChatTokenizer
from loramill.registry import ArtifactStore
from loramill.types import DatasetRecord, TrainOn

#: The one file of a dataset's artifact.
DATA_FILE = "data.jsonl"

#: Number of files whose lengths are cached, and whose examples are: a job's two, each of which is checked twice.
_CACHE_SIZE, _EXAMPLES_CACHE_SIZE = 4096, 2


class DatasetChecks:
    """Checks datasets against jobs' specs, each once per spec that differs in what is checked."""

    def __init__(self, artifacts: ArtifactStore, tokenizer: ChatTokenizer) -> None:
        self._artifacts, self._tokenizer = artifacts, tokenizer
        self._read = lru_cache(_EXAMPLES_CACHE_SIZE)(self._read_examples)
        self._lengths = lru_cache(_CACHE_SIZE)(self._check_lengths)
        self._warnings = lru_cache(_CACHE_SIZE)(self._compare)
        self._format = lru_cache(_CACHE_SIZE)(self._first_row_format)

    def lengths(self, dataset: DatasetRecord, max_length: int, train_on: TrainOn) -> Sequence[int]:
        """Tokens of each sequence of the dataset; an example may have several, and a pair is one of both answers.

        Raises:
            DatasetInvalid: an example is longer than `max_length`, or can't be trained on in this way.
        """
        return self._lengths(dataset.artifact, dataset.filename, max_length, train_on)

    def is_chat(self, dataset: DatasetRecord) -> bool:
        """Whether the dataset contains conversations; otherwise it contains prompts and completions."""
        return self._format(dataset.artifact)[1]

    def kind(self, dataset: DatasetRecord) -> DataKind:
        """The kind of the dataset's examples."""
        return self._format(dataset.artifact)[0]

    def warnings(self, train: DatasetRecord, valid: DatasetRecord) -> tuple[str, ...]:
        """Warnings about a train/validation pair."""
        return self._warnings(train.artifact, train.filename, valid.artifact, valid.filename)

    def _check_lengths(self, artifact: str, filename: str, max_length: int, train_on: TrainOn) -> Sequence[int]:
        return check_tokens(self._read(artifact, filename), self._tokenizer, max_length, train_on)

    def _compare(self, train: str, train_name: str, valid: str, valid_name: str) -> tuple[str, ...]:
        return compare_splits(self._read(train, train_name), self._read(valid, valid_name))

    def _first_row_format(self, artifact: str) -> tuple[DataKind, bool]:
        with self._artifacts.open(artifact, DATA_FILE) as content:
            return row_format(next(iter_rows(content))[1])

    def _read_examples(self, artifact: str, filename: str) -> Examples:
        return read_examples(self._artifacts.read(artifact, DATA_FILE), filename)
