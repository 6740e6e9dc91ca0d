"""Validation of training data, before any compute: every problem is found at once, and says how to mend it.

A file is JSONL in UTF-8: one object per line, all of one form. Chat: OpenAI's format, read by `conversation.py`;
every message of the assistant is trained. Completion: `{"prompt", "completion"}`, plain text, of which the
completion is trained. Blank lines are skipped.

An assistant's message, or a line of completion data, may have a `"weight"`: 0 is not trained, 2 counts twice;
as in OpenAI's format, the default is 1.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from loramill.data.conversation import (
    LineError,
    answer_text,
    read_conversation,
    read_text,
    read_weight,
    read_weights,
    refuse_other_keys,
)
from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.jsonl import iter_rows, parse
from loramill.data.tokenizer import ChatTokenizer, Message
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.types import TrainOn

#: Problems, or lines in one warning, that are listed; the rest is counted.
MAX_LISTED = 20

_FORMATS_HINT = 'write {"messages": [...]}, or {"prompt": "...", "completion": "..."}'


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Attributes:
        messages: chat: the whole conversation with the answer at its end; completion data: empty.
        prompt: completion data: the text before the completion; chat: None.
        completion: the last answer.
        line: where it stands in its file, from 1.
        weights: of the loss of each answer, in order, at least one above 0; None: the file gives none.
        tools: chat: what the assistant may call, as chat templates know it.
    """

    messages: tuple[Message, ...]
    prompt: str | None
    completion: str
    line: int
    weights: tuple[float, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def content_key(self) -> str:
        """Equal for two examples that say the same."""
        return json.dumps([self.prompt, self.completion, self.messages, self.tools])

    @property
    def answers(self) -> list[int]:
        """The assistant's messages, by index."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def supervised_answers(self, train_on: TrainOn) -> list[tuple[int, float]]:
        """The messages whose loss counts, by index, and its weight; JobSpec says what `learn` means."""
        answers, weights = self.answers, self.weights or (1.0,) * len(self.answers)
        first = len(answers) - 1 if train_on == "only_last" or (train_on == "last" and self.weights is None) else 0
        return [(index, weight) for index, weight in zip(answers[first:], weights[first:], strict=True) if weight]


@dataclass(frozen=True, slots=True)
class Examples:
    """A file's examples, all valid, and what is odd about them."""

    filename: str
    examples: tuple[Example, ...]
    warnings: tuple[str, ...]


class _Problems:
    """Collects a file's problems, each with its line; a few are kept, all are counted."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._listed: list[str] = []
        self.count = 0

    def add(self, line: int | None, text: str) -> None:
        self.count += 1
        if len(self._listed) < MAX_LISTED:
            self._listed.append(f"{self._filename}{'' if line is None else f', line {line}'}: {text}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        more = f"; the first {MAX_LISTED}" if self.count > MAX_LISTED else ""
        plural = "problem" if self.count == 1 else "problems"
        head = f"{self._filename} has {self.count} {plural}{more}:"
        raise DatasetInvalid("\n".join([head, *self._listed]), problems=self._listed)


def read_examples(raw: bytes, filename: str, *, minimum: int = 1) -> Examples:
    """Reads and checks a file of examples.

    Args:
        raw: the file's content.
        filename: its name, for messages.
        minimum: examples below which the file is refused.

    Raises:
        DatasetInvalid: `problems` lists what is wrong, with file, line, field and what to do.
    """
    problems = _Problems(filename)
    if (kind := detect_kind(raw)) is not None:
        problems.add(
            None, f"it is {describe_kind(kind)}; upload JSONL in UTF-8 (`loramill submit` converts tables to it)."
        )
        problems.raise_if_any()
    examples: list[Example] = []
    count = 0
    for line, row in iter_rows(raw):
        count += 1
        try:
            example = _read_row(row, line)
        except LineError as bad:
            problems.add(line, str(bad))
            continue
        if examples and (example.prompt is None) != (examples[0].prompt is None):
            problems.add(
                line, f"it has another form than line {examples[0].line}; keep one form a file: {_FORMATS_HINT}."
            )
            continue
        examples.append(example)
    if not count:
        problems.add(None, f"it is empty; on each line {_FORMATS_HINT}.")
    elif count < minimum:
        had = "1 example" if count == 1 else f"{count} examples"
        problems.add(None, f"it has {had}, and at least {minimum} are needed; add more.")
    problems.raise_if_any()
    return Examples(filename, tuple(examples), _repeated(filename, examples))


def is_chat(row: bytes) -> bool:
    """Whether a line of a valid file is a conversation; else it is a prompt and its completion."""
    return "messages" in parse(row)


def check_tokens(
    examples: Examples, tokenizer: ChatTokenizer, max_length: int, train_on: TrainOn = "all"
) -> Sequence[int]:
    """Checks examples by the base's tokenizer and chat template: lengths, tools, and what the template refuses.

    Examples are never truncated, since that would cut off the answer that is to be trained.

    Args:
        examples: as read.
        tokenizer: the base's.
        max_length: maximum tokens of an example: prompt, completion and end together.
        train_on: the answers of a conversation to train on.

    Returns:
        Tokens of each sequence; an example may have several.

    Raises:
        DatasetInvalid: as `read_examples`.
    """
    problems, tokenizer = _Problems(examples.filename), tokenizer.at_time(datetime.now(UTC))
    lengths = array("L")
    for example in examples.examples:
        try:
            sequences = tokenizer.encode_example(example, train_on).sequences
        except InvalidRequest as error:
            problems.add(example.line, error.message)
            continue
        lengths.extend(len(sequence.tokens) for sequence in sequences)
        longest = max(sequences, key=lambda sequence: len(sequence.tokens))
        count, prompt = len(longest.tokens), longest.prompt_length
        if any(span.stop == span.start + 1 for sequence in sequences for span in sequence.spans):
            problems.add(
                example.line,
                "the completion has no tokens: this base's vocabulary or chat template leaves nothing of it; "
                "write it in other characters, or remove the line.",
            )
        if count > max_length:
            lost = "the prompt alone fills it, " if prompt >= max_length else ""
            problems.add(
                example.line,
                f"it has {count} tokens (prompt {prompt}, completion {count - prompt}), {lost}the limit is "
                f"{max_length}; shorten it or raise max_length (nothing is truncated: that would cut the completion).",
            )
    problems.raise_if_any()
    return lengths


def compare_splits(train: Examples, valid: Examples) -> tuple[str, ...]:
    """Warns of validation examples that are in the training file too: they make the validation loss look too good."""
    where = {example.content_key: example.line for example in reversed(train.examples)}
    shared = [(example.line, where[example.content_key]) for example in valid.examples if example.content_key in where]
    if not shared:
        return ()
    lines = _enumerate_first(f"line {line} is line {other}" for line, other in shared)
    return (
        f"{valid.filename}: {len(shared)} of {len(valid.examples)} examples are in {train.filename} too ({lines}); "
        "remove them from one of the files, or the validation loss will look better than it is.",
    )


def _read_row(row: bytes, line: int) -> Example:
    try:
        value = parse(row)
    except DatasetInvalid as error:
        raise LineError(error.message) from error
    if not isinstance(value, dict):
        raise LineError(f"it is not an object; {_FORMATS_HINT}.")
    if "messages" in value:
        chat = read_conversation(value)
        last = chat.messages[-1]
        called = [(call["function"]["name"], call["function"]["arguments"]) for call in last.get("tool_calls", [])]
        answer = answer_text(last["content"], called)
        return Example(chat.messages, None, answer, line, chat.weights, chat.tools)
    if "prompt" not in value and "completion" not in value:
        raise LineError(f"it has no messages; {_FORMATS_HINT}.")
    refuse_other_keys(value, ("prompt", "completion", "weight"), "the line")
    prompt, completion = (read_text(value, field, field) for field in ("prompt", "completion"))
    weights = read_weights([read_weight(value, "weight")])
    return Example(messages=(), prompt=prompt, completion=completion, line=line, weights=weights)


def _repeated(filename: str, examples: Sequence[Example]) -> tuple[str, ...]:
    first: dict[str, int] = {}
    again = [
        (example.line, line)
        for example in examples
        if (line := first.setdefault(example.content_key, example.line)) != example.line
    ]
    if not again:
        return ()
    lines = _enumerate_first(f"line {line} repeats line {other}" for line, other in again)
    return (f"{filename}: {len(again)} examples repeat earlier ones ({lines}); they count twice in training.",)


def _enumerate_first(items: Iterator[str]) -> str:
    """The first of many items, and how many follow."""
    shown = list(items)
    more = f", and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return ", ".join(shown[:MAX_LISTED]) + more
