"""Feedback as rows of training data: corrections are examples, ratings make preference pairs. Pure functions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loramill.data.examples import read_examples
from loramill.errors import DatasetInvalid
from loramill.registry.feedback.use import UnusedFeedback
from loramill.types import CompletionKind, Rating

#: The form of an adapter's data: conversations, or prompts with completions.
Form = Literal["messages", "prompt"]


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row of data, and the IDs of the feedback that it is made of."""

    row: bytes
    feedback: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnusableFeedback:
    """Feedback that no row can be made of, and why."""

    feedback: tuple[str, ...]
    reason: str


def form_of(feedback: UnusedFeedback) -> Form:
    """Returns the form of the rows that are made of feedback."""
    return "messages" if feedback.completion.kind is CompletionKind.CHAT else "prompt"


def examples_of(
    feedback: Sequence[UnusedFeedback], fields: Collection[str] = ()
) -> tuple[list[PreparedRow], list[UnusableFeedback]]:
    """Returns a row for each correction that was not used: the conversation with the corrected answer.

    Args:
        feedback: the feedback.
        fields: what the rows' metadata has, of the completion's metadata and its `user`.
    """
    rows: list[PreparedRow] = []
    unusable: list[UnusableFeedback] = []
    for each in feedback:
        if each.for_example and each.correction is not None:
            _add(rows, unusable, _example(each, each.correction, fields), (each.id,))
    return rows, unusable


def pairs_of(
    feedback: Sequence[UnusedFeedback], fields: Collection[str] = ()
) -> tuple[list[PreparedRow], list[UnusableFeedback]]:
    """Returns preference pairs, each of feedback that is in no other pair.

    A correction is better than the answer that it corrects. Of the other answers to one prompt, each good one is
    better than a bad one, in the order in which they were rated; what has no partner yet waits for one.

    Args:
        feedback: the feedback.
        fields: what the rows' metadata has, of the metadata and the `user` of the completion with the better answer.
    """
    rows: list[PreparedRow] = []
    unusable: list[UnusableFeedback] = []
    good: defaultdict[str, list[UnusedFeedback]] = defaultdict(list)
    bad: defaultdict[str, list[UnusedFeedback]] = defaultdict(list)
    for each in feedback:
        if not each.for_pair:
            continue
        if each.correction is not None:
            _add(rows, unusable, _pair(each, _corrected(each, each.correction), _answer(each), fields), (each.id,))
        elif each.rating is not None:
            (good if each.rating is Rating.GOOD else bad)[_prompt_key(each)].append(each)
    for prompt, better in good.items():
        for chosen, rejected in zip(better, bad[prompt], strict=False):
            _add(rows, unusable, _pair(chosen, _answer(chosen), _answer(rejected), fields), (chosen.id, rejected.id))
    return rows, unusable


def _add(
    rows: list[PreparedRow], unusable: list[UnusableFeedback], line: dict[str, Any] | None, ids: tuple[str, ...]
) -> None:
    """Adds a line to `rows` if it is valid data, or else the reason why not to `unusable`."""
    if line is None:
        unusable.append(UnusableFeedback(ids, "The prompt was given as token ids, not as text."))
        return
    row = json.dumps(line, ensure_ascii=False, sort_keys=True).encode()
    try:
        read_examples(row + b"\n", "feedback")
    except DatasetInvalid as error:
        unusable.append(UnusableFeedback(ids, error.problems[0] if error.problems else error.message))
    else:
        rows.append(PreparedRow(row, ids))


def _example(feedback: UnusedFeedback, correction: str, fields: Collection[str]) -> dict[str, Any] | None:
    prompt, metadata = _prompt(feedback), _metadata(feedback, fields)
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": correction, **metadata}
    return {**prompt, "messages": [*prompt["messages"], _corrected(feedback, correction)], **metadata}


def _pair(feedback: UnusedFeedback, better: Any, worse: Any, fields: Collection[str]) -> dict[str, Any] | None:
    prompt, metadata = _prompt(feedback), _metadata(feedback, fields)
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": better, "rejected": worse, **metadata}
    return {"input": prompt, "preferred_output": [better], "non_preferred_output": [worse], **metadata}


def _metadata(feedback: UnusedFeedback, fields: Collection[str]) -> dict[str, Any]:
    """The field of a row for its metadata, if it has some."""
    user = {} if feedback.completion.user is None else {"user": feedback.completion.user}
    found = {name: value for name, value in (user | feedback.completion.metadata).items() if name in fields}
    return {"metadata": found} if found else {}


def _prompt(feedback: UnusedFeedback) -> str | dict[str, Any] | None:
    """Returns the prompt as text, or as an object with messages; None: it is not text."""
    request = feedback.completion.request
    if form_of(feedback) == "messages":
        return {key: request[key] for key in ("messages", "tools") if request[key]}
    prompt = request["prompts"][feedback.choice // request["n"]]
    return prompt if isinstance(prompt, str) else None


def _answer(feedback: UnusedFeedback) -> Any:
    """Returns the answer that was given, as a message or a text."""
    choice = feedback.completion.response["choices"][feedback.choice]
    if form_of(feedback) == "messages":
        return {key: value for key, value in choice["message"].items() if value is not None}
    # An echoed prompt is a part of the text.
    prompt = _prompt(feedback)
    echoed = feedback.completion.request["echo"] and isinstance(prompt, str)
    return choice["text"].removeprefix(prompt) if echoed else choice["text"]


def _corrected(feedback: UnusedFeedback, correction: str) -> Any:
    return {"role": "assistant", "content": correction} if form_of(feedback) == "messages" else correction


def _prompt_key(feedback: UnusedFeedback) -> str:
    """Returns a text that is equal for answers to the same prompt."""
    return json.dumps([form_of(feedback), _prompt(feedback)], sort_keys=True)
