"""What the gateway knows of files that it has read: a file never changes, and one is often submitted many times."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache

from loramill.data.examples import Examples, check_tokens, compare_splits, is_chat, read_examples
from loramill.data.jsonl import iter_rows
from loramill.data.tokenizer import ChatTokenizer
from loramill.registry import ArtifactStore
from loramill.types import DatasetRecord, TrainOn

#: The one file of a dataset's artifact.
DATA_FILE = "data.jsonl"

#: Files that are remembered; of each only its lengths are.
_CACHE_SIZE = 4096


class DatasetChecks:
    """Checks files against jobs' specs, each file once for each spec that differs in what is checked."""

    def __init__(self, artifacts: ArtifactStore, tokenizer: ChatTokenizer) -> None:
        self._artifacts, self._tokenizer = artifacts, tokenizer
        self._lengths = lru_cache(_CACHE_SIZE)(self._measure)
        self._shared = lru_cache(_CACHE_SIZE)(self._compare)
        self._chat = lru_cache(_CACHE_SIZE)(self._begins_with_chat)

    def lengths(self, file: DatasetRecord, max_length: int, train_on: TrainOn) -> Sequence[int]:
        """Tokens of each of the file's sequences; an example may have several.

        Raises:
            DatasetInvalid: an example is longer than `max_length`, or can't be learnt from in this way.
        """
        return self._lengths(file.artifact, file.filename, max_length, train_on)

    def is_chat(self, file: DatasetRecord) -> bool:
        """Whether the file holds conversations; else it holds prompts and completions."""
        return self._chat(file.artifact)

    def _begins_with_chat(self, artifact: str) -> bool:
        with self._artifacts.open(artifact, DATA_FILE) as content:
            return is_chat(next(iter_rows(content))[1])

    def warnings(self, train: DatasetRecord, valid: DatasetRecord) -> tuple[str, ...]:
        """What is odd about two files together."""
        return self._shared(train.artifact, train.filename, valid.artifact, valid.filename)

    def _measure(self, artifact: str, filename: str, max_length: int, learn: TrainOn) -> Sequence[int]:
        examples = self._read(artifact, filename)
        tokenizer = self._tokenizer.at_time(datetime.now(UTC))
        check_tokens(examples, tokenizer, max_length, learn)
        found = (tokenizer.encode_example(example, learn) for example in examples.examples)
        return array("L", (len(sequence.tokens) for example in found for sequence in example.sequences))

    def _compare(self, train: str, train_name: str, valid: str, valid_name: str) -> tuple[str, ...]:
        return compare_splits(self._read(train, train_name), self._read(valid, valid_name))

    def _read(self, artifact: str, filename: str) -> Examples:
        return read_examples(self._artifacts.read(artifact, DATA_FILE), filename)
