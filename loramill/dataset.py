"""Validation of training data, before any compute: every problem is found at once, and says how to mend it.

A file is JSONL: UTF-8, an object a line, all of one form. Chat: `{"messages": [{"role", "content"}, …]}`, a system
message or none, then user and assistant in turn, ending with the assistant's answer, which is what is learnt.
Completion: `{"prompt", "completion"}`, plain text, of which the completion is learnt. Blank lines are skipped.

An assistant's message, or a line of completion data, may have a `"weight"`: 0 isn't learnt, 2 counts twice. As in
OpenAI's format, an answer without one has weight 1 where another of its conversation has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from loramill.chat import ROLES, ChatTokenizer, Message
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.filetype import called, magic
from loramill.jsonl import parse, rows

#: Problems, or lines in one warning, that are listed; the rest is counted.
LISTED = 20

#: Of an answer's loss.
MAX_WEIGHT = 1e6

_FORM = 'write {"messages": [...]}, or {"prompt": "...", "completion": "..."}'


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Attributes:
        messages: chat: the whole conversation with the answer at its end; completion data: empty.
        prompt: completion data: the text before the completion; chat: None.
        completion: the last answer.
        line: where it stands in its file, from 1.
        weights: of the loss of each answer, in order, at least one above 0; None: the file gives none.
    """

    messages: tuple[Message, ...]
    prompt: str | None
    completion: str
    line: int
    weights: tuple[float, ...] | None = None

    @property
    def key(self) -> tuple[str | None, ...]:
        """Equal for two examples that say the same."""
        turns = (part for message in self.messages for part in (message["role"], message["content"]))
        return (self.prompt, self.completion, *turns)

    def learnt(self, learn: Literal["last", "all"]) -> list[tuple[int, float]]:
        """The messages whose loss counts, by index, and its weight; without weights, `learn` says which they are."""
        answers = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        if self.weights is None:
            return [(index, 1.0) for index in (answers if learn == "all" else answers[-1:])]
        return [(index, weight) for index, weight in zip(answers, self.weights, strict=True) if weight]


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
        if len(self._listed) < LISTED:
            self._listed.append(f"{self._filename}{'' if line is None else f', line {line}'}: {text}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        more = f"; the first {LISTED}" if self.count > LISTED else ""
        plural = "problem" if self.count == 1 else "problems"
        head = f"{self._filename} has {self.count} {plural}{more}:"
        raise DatasetInvalid("\n".join([head, *self._listed]), problems=self._listed)


class _Bad(Exception):  # never leaves this module
    """What is wrong with one line."""


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
    if (kind := magic(raw)) is not None:
        problems.add(None, f"it is {called(kind)}; upload JSONL in UTF-8 (`loramill submit` converts tables to it).")
        problems.raise_if_any()
    examples: list[Example] = []
    count = 0
    for line, row in rows(raw):
        count += 1
        try:
            example = _read_row(row, line)
        except _Bad as bad:
            problems.add(line, str(bad))
            continue
        if examples and (example.prompt is None) != (examples[0].prompt is None):
            problems.add(line, f"it has another form than line {examples[0].line}; keep one form a file: {_FORM}.")
            continue
        examples.append(example)
    if not count:
        problems.add(None, f"it is empty; on each line {_FORM}.")
    elif count < minimum:
        problems.add(None, f"it has {count} examples, and at least {minimum} are needed; add more.")
    problems.raise_if_any()
    return Examples(filename, tuple(examples), _repeated(filename, examples))


def check_tokens(
    examples: Examples, tokenizer: ChatTokenizer, max_length: int, learn: Literal["last", "all"] = "last"
) -> None:
    """Checks what only the base's tokenizer can tell: lengths, and special tokens spelled in the text.

    Examples are never truncated: what is cut off is the end, the very answer that is to be learnt.

    Args:
        examples: as read.
        tokenizer: the base's.
        max_length: tokens of the longest example, prompt and completion and end together.
        learn: which answers of a conversation that gives them no weights.

    Raises:
        DatasetInvalid: as `read_examples`.
    """
    problems, tokenizer = _Problems(examples.filename), tokenizer.at(datetime.now(UTC))
    for example in examples.examples:
        for field, text in _texts(example):
            for token in tokenizer.control_tokens:
                if token in text:
                    problems.add(
                        example.line,
                        f"{field} spells the special token {token}, which delimits texts of this base; remove it "
                        "(the chat template writes it where it belongs).",
                    )
        try:
            encoded = tokenizer.example(example, learn)
        except InvalidRequest as error:
            problems.add(example.line, error.message)
            continue
        count, prompt = len(encoded.tokens), encoded.prompt_length
        if any(span.stop == span.start + 1 for span in encoded.spans):
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


def compare_splits(train: Examples, valid: Examples) -> tuple[str, ...]:
    """Warns of validation examples that are in the training file too: they make the validation loss look too good."""
    where = {example.key: example.line for example in reversed(train.examples)}
    shared = [(example.line, where[example.key]) for example in valid.examples if example.key in where]
    if not shared:
        return ()
    lines = _listed(f"line {line} is line {other}" for line, other in shared)
    return (
        f"{valid.filename}: {len(shared)} of {len(valid.examples)} examples are in {train.filename} too ({lines}); "
        "remove them from one of the files, or the validation loss will look better than it is.",
    )


def _read_row(row: bytes, line: int) -> Example:
    try:
        value = parse(row)
    except DatasetInvalid as error:
        raise _Bad(error.message) from error
    if not isinstance(value, dict):
        raise _Bad(f"it is not an object; {_FORM}.")
    if "messages" in value:
        _no_other_keys(value, ("messages",), "the line")
        messages, weights = _read_messages(value["messages"])
        return Example(messages=messages, prompt=None, completion=messages[-1]["content"], line=line, weights=weights)
    if "prompt" not in value and "completion" not in value:
        raise _Bad(f"it has no messages; {_FORM}.")
    _no_other_keys(value, ("prompt", "completion", "weight"), "the line")
    prompt, completion = (_text(value, field, field) for field in ("prompt", "completion"))
    weights = _weights([_weight(value, "weight")])
    return Example(messages=(), prompt=prompt, completion=completion, line=line, weights=weights)


def _read_messages(value: object) -> tuple[tuple[Message, ...], tuple[float, ...] | None]:
    if not isinstance(value, list) or not value:
        raise _Bad("messages must be a list with at least a user's and an assistant's message; add them.")
    messages: list[Message] = []
    weights: list[float | None] = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _Bad(f'{where} must be an object; write {{"role": "...", "content": "..."}}.')
        role = message.get("role")
        if role not in ROLES:
            raise _Bad(f"{where}.role is {_shown(role)}; use one of {', '.join(ROLES)}.")
        if role == "assistant":
            weights.append(_weight(message, f"{where}.weight"))
        _no_other_keys(message, ("role", "content", "weight")[: 3 if role == "assistant" else 2], where)
        content = _text(message, "content", f"{where}.content", empty=role == "system")
        messages.append(Message(role=role, content=content))
    _check_order([message["role"] for message in messages])
    return tuple(messages), _weights(weights)


def _weight(value: dict[str, Any], field: str) -> float | None:
    """The weight that is said, if one is."""
    if "weight" not in value:
        return None
    weight = value["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise _Bad(f"{field} is {_shown(weight)}; it must be a number from 0 (not learnt) to {MAX_WEIGHT:g}.")
    return float(weight)


def _weights(said: Sequence[float | None]) -> tuple[float, ...] | None:
    if all(weight is None for weight in said):
        return None
    if not any(weight is None or weight for weight in said):
        raise _Bad("weight is 0 for every answer, so that nothing is learnt; give one more, or remove the line.")
    return tuple(1.0 if weight is None else weight for weight in said)


def _check_order(roles: Sequence[str]) -> None:
    first = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[first:], start=first):
        expected = ("user", "assistant")[(index - first) % 2]
        if role == "system":
            raise _Bad(f"messages[{index}].role is system; the system message stands first, and once.")
        if role != expected:
            raise _Bad(f"messages[{index}].role is {role} where {expected} is due; user and assistant take turns.")
    if roles[-1] != "assistant":
        raise _Bad(
            f"messages[{len(roles) - 1}].role is {roles[-1]}; the last message must be the assistant's: "
            "it is the answer that is learnt."
        )


def _text(value: dict[str, Any], key: str, field: str, *, empty: bool = False) -> str:
    if key not in value:
        raise _Bad(f"{field} is missing; add it.")
    text = value[key]
    if not isinstance(text, str):
        raise _Bad(f"{field} is {_shown(text)}; it must be a string.")
    if not empty and not text.strip():
        raise _Bad(f"{field} is empty; write the text, or remove the line.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _Bad(f"{field} holds half a surrogate pair (\\ud800 to \\udfff), which is no character; remove it.")
    return text


def _no_other_keys(value: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    other = next((key for key in value if key not in allowed), None)
    if other is not None:
        raise _Bad(f"{where} has the unknown key {_shown(other)}; it may have {', '.join(allowed)} only.")


def _shown(value: object) -> str:
    """A foreign value for a message: short, and printable whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _texts(example: Example) -> Iterator[tuple[str, str]]:
    """The texts of an example with the names of their fields."""
    if example.prompt is not None:
        yield from (("prompt", example.prompt), ("completion", example.completion))
    for index, message in enumerate(example.messages):
        yield f"messages[{index}].content", message["content"]


def _repeated(filename: str, examples: Sequence[Example]) -> tuple[str, ...]:
    first: dict[tuple[str | None, ...], int] = {}
    again = [
        (example.line, line)
        for example in examples
        if (line := first.setdefault(example.key, example.line)) != example.line
    ]
    if not again:
        return ()
    lines = _listed(f"line {line} repeats line {other}" for line, other in again)
    return (f"{filename}: {len(again)} examples repeat earlier ones ({lines}); they count twice in training.",)


def _listed(items: Iterator[str]) -> str:
    """The first of many items, and how many follow."""
    shown = list(items)
    more = f", and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    return ", ".join(shown[:LISTED]) + more
