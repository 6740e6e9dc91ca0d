"""Reads and validates training data before anything is computed; finds all problems at once, each with its fix.

A file is JSONL in UTF-8: one object per line, all in one format. Chat data is in OpenAI's format, read by
`conversation.py`; every message of the assistant is trained. Completion data is `{"prompt", "completion"}`, plain text;
the completion is trained. Blank lines are skipped.

An assistant's message, or a line of completion data, may have a `"weight"`: 0 is not trained, 2 counts twice; as in
OpenAI's format, the default is 1.

A line may have `"metadata"`, an object of texts, numbers and booleans, which is not trained: evaluations are divided by
its fields.

Preference data has a better and a worse answer on each line, or one with a label, and is read by `preferences.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from loramill.data.jsonl import iter_rows, parse, short_repr
from loramill.data.messages import Message
from loramill.data.preferences import DataKind, JudgedPrompt, kind_of, read_judged
from loramill.data.problems import ProblemList, list_first, unit_of
from loramill.errors import DatasetInvalid
from loramill.plural import counted
from loramill.types import TrainOn

_FORMATS_HINT = 'write {"messages": [...]}, or {"prompt": "...", "completion": "..."}'


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Attributes:
        messages: the conversation, which ends with an answer; empty for completion data.
        prompt: the text before the completion; None for chat data.
        completion: the last answer.
        line: its line in the file, from 1.
        weights: weights of the loss of each answer, in order, at least one above 0; None: the file has none.
        tools: the tools of chat data, in the form that chat templates take.
        rejected: the same prompt with a worse answer.
        label: whether the answer is good; None: the data has no labels.
        metadata: what the line says about itself.
    """

    messages: tuple[Message, ...]
    prompt: str | None
    completion: str
    line: int
    weights: tuple[float, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: Example | None = None
    label: bool | None = None
    metadata: Mapping[str, str | float | bool] = field(default_factory=dict)

    @property
    def kind(self) -> DataKind:
        """What the example teaches."""
        return "preference" if self.rejected is not None else "supervised" if self.label is None else "labeled"

    @property
    def format(self) -> tuple[DataKind, bool]:
        """The kind, and whether it is chat data; a job takes examples of one format."""
        return self.kind, self.prompt is None

    @property
    def sides(self) -> tuple[Example, ...]:
        """The example, and for a preference the worse answer."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def content_key(self) -> str:
        """A text that is equal for two examples of the same content."""
        worse = None if self.rejected is None else self.rejected.content_key
        return json.dumps([self.prompt, self.completion, self.messages, self.tools, worse, self.label])

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def supervised_answers(self, train_on: TrainOn) -> list[tuple[int, float]]:
        """Indices of the messages to train on, each with the weight of its loss; JobSpec describes `train_on`."""
        answers, weights = self.answers, self.weights or (1.0,) * len(self.answers)
        first = len(answers) - 1 if train_on == "only_last" or (train_on == "last" and self.weights is None) else 0
        return [(index, weight) for index, weight in zip(answers[first:], weights[first:], strict=True) if weight]


@dataclass(frozen=True, slots=True)
class Examples:
    """The valid examples of a file, and warnings about them."""

    filename: str
    examples: tuple[Example, ...]
    warnings: tuple[str, ...]

    @property
    def kind(self) -> DataKind:
        """The kind of all examples."""
        return self.examples[0].kind


def read_examples(raw: bytes, filename: str, *, minimum: int = 1) -> Examples:
    """Reads and checks a file of examples.

    Args:
        raw: the file's content.
        filename: its name, for messages.
        minimum: the fewest examples that the file may have.

    Raises:
        DatasetInvalid: `problems` lists the problems, with file, line, field and fix.
    """
    problems, unit = ProblemList(filename), unit_of(filename)
    if (kind := detect_kind(raw)) is not None:
        problems.add(f"it is {describe_kind(kind)}; upload JSONL in UTF-8 (`loramill submit` converts tables to it).")
        problems.raise_if_any()
    examples: list[Example] = []
    count = 0
    for line, row in iter_rows(raw):
        count += 1
        try:
            example = read_row(row, line)
        except LineError as bad:
            problems.add(str(bad), f"{unit} {line}")
            continue
        if examples and example.format != examples[0].format:
            problem = f"it has another format than {unit} {examples[0].line}; use one format per file."
            problems.add(problem, f"{unit} {line}")
            continue
        examples.append(example)
    if not count:
        problems.add(f"it is empty; on each line {_FORMATS_HINT}.")
    elif count < minimum:
        problems.add(f"it has {counted(count, 'example')}, and at least {minimum} are needed; add more.")
    problems.raise_if_any()
    return Examples(filename, tuple(examples), _repeated(filename, examples))


def row_format(row: bytes) -> tuple[DataKind, bool]:
    """The kind of a line of a valid file, and whether it is chat data; otherwise it has texts."""
    return read_row(row, 1).format


def compare_splits(train: Examples, valid: Examples) -> tuple[str, ...]:
    """Warnings about validation examples that are also in the training file, which make the validation loss too low."""
    where = {example.content_key: example.line for example in reversed(train.examples)}
    shared = [(example.line, where[example.content_key]) for example in valid.examples if example.content_key in where]
    if not shared:
        return ()
    valid_unit, train_unit = unit_of(valid.filename), unit_of(train.filename)
    lines = list_first(f"{valid_unit} {line} is {train_unit} {other}" for line, other in shared)
    return (
        f"{valid.filename}: {len(shared)} of {len(valid.examples)} examples are in {train.filename} too ({lines}); "
        "remove them from one of the files, or the validation loss will look better than it is.",
    )


def read_row(row: bytes, line: int) -> Example:
    """Reads and checks one line of a file.

    Raises:
        LineError: what is wrong with it.
    """
    try:
        value = parse(row)
    except DatasetInvalid as error:
        raise LineError(error.message) from error
    if not isinstance(value, dict):
        raise LineError(f"it is not an object; {_FORMATS_HINT}.")
    metadata = _read_metadata(value.pop("metadata", None))
    example = _read_example(value, line)
    return replace(example, metadata=metadata) if metadata else example


def _read_metadata(value: object) -> dict[str, str | float | bool]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise LineError(f"metadata is {short_repr(value)}; it must be an object.")
    wrong = next((key for key, item in value.items() if not isinstance(item, str | int | float)), None)
    if wrong is not None:
        raise LineError(f"metadata.{wrong} is {short_repr(value[wrong])}; it must be text, a number, true or false.")
    return value


def _read_example(value: dict[str, Any], line: int) -> Example:
    if kind_of(value) != "supervised":
        return _judged_example(read_judged(value), line)
    value = {key: item for key, item in value.items() if key != "label"}  # null: there is none
    if "messages" in value:
        chat = read_conversation(value)
        return _chat_example(chat.messages, chat.weights, chat.tools, line)
    if "prompt" not in value and "completion" not in value:
        raise LineError(f"it has no messages; {_FORMATS_HINT}.")
    refuse_other_keys(value, ("prompt", "completion", "weight"), "the line")
    prompt, completion = (read_text(value, field, field) for field in ("prompt", "completion"))
    weights = read_weights([read_weight(value, "weight")])
    return Example(messages=(), prompt=prompt, completion=completion, line=line, weights=weights)


def _chat_example(
    messages: tuple[Message, ...],
    weights: tuple[float, ...] | None,
    tools: tuple[Mapping[str, Any], ...],
    line: int,
) -> Example:
    last = messages[-1]
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in last.get("tool_calls", [])]
    return Example(messages, None, answer_text(last["content"], called), line, weights, tools)


def _judged_example(judged: JudgedPrompt, line: int) -> Example:
    """The example of a line of preference data; of a conversation only the answer that is judged has a weight."""
    sides = [Example((), prompt, answer, line) for prompt, answer in judged.texts]
    for messages in judged.conversations:
        earlier = sum(message["role"] == "assistant" for message in messages[:-1])
        sides.append(_chat_example(messages, (*[0.0] * earlier, 1.0), judged.tools, line))
    return replace(sides[0], rejected=sides[1] if len(sides) > 1 else None, label=judged.label)


def _repeated(filename: str, examples: Sequence[Example]) -> tuple[str, ...]:
    first: dict[str, int] = {}
    again = [
        (example.line, line)
        for example in examples
        if (line := first.setdefault(example.content_key, example.line)) != example.line
    ]
    if not again:
        return ()
    unit = unit_of(filename)
    repeat = "1 example repeats an earlier one" if len(again) == 1 else f"{len(again):,} examples repeat earlier ones"
    lines = list_first(f"{unit} {line} repeats {unit} {other}" for line, other in again)
    return (f"{filename}: {repeat} ({lines}); training uses every repetition.",)
