"""Reads one line of preference data: a prompt with a better and a worse answer, or with one answer that has a label.

Pairs are in OpenAI's format, `{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output":
[...]}`, or in TRL's, `{"prompt", "chosen", "rejected"}`: texts, or lists of messages. Without `prompt`, the prompt is
the messages that both lists begin with. Labels are in TRL's format, `{"prompt", "completion", "label"}`, or
`{"messages": [...], "label": true}`, whose label is that of the last message.

An answer is one message of the assistant, as in OpenAI's format. Messages have no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from loramill.data.conversation import (
    LineError,
    drop_empty,
    read_messages,
    read_prompt,
    read_text,
    read_tools,
    refuse_other_keys,
)
from loramill.data.jsonl import short_repr
from loramill.data.messages import Message

#: What the examples of a file teach: answers, which of two answers is better, or whether an answer is good.
DataKind = Literal["supervised", "preference", "labeled"]

_OPENAI_KEYS = ("input", "preferred_output", "non_preferred_output")
_TRL_KEYS = ("prompt", "chosen", "rejected", "tools")
_LABELED_KEYS = ("prompt", "completion", "label", "tools")


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """A prompt with a better and a worse answer, or with one answer that has a label.

    Attributes:
        conversations: the prompt's messages and an answer, for each answer, the better first; empty for texts.
        texts: the prompt and an answer, for each answer; empty for messages.
        tools: tools for the assistant.
        label: whether the only answer is good; None: there are two.
    """

    conversations: tuple[tuple[Message, ...], ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    label: bool | None = None


def kind_of(line: Mapping[str, Any]) -> DataKind:
    """The kind of a line, by its keys."""
    if any(key in line for key in (*_OPENAI_KEYS, "chosen", "rejected")):
        return "preference"
    return "labeled" if line.get("label") is not None else "supervised"


def read_judged(line: Mapping[str, Any]) -> JudgedPrompt:
    """Reads the object of a line, whose kind is not "supervised".

    Raises:
        LineError: it is in none of the formats; the message names the field and the fix.
    """
    line = drop_empty(line)
    if kind_of(line) == "labeled":
        return _labeled(line)
    found = _openai_pair(line) if any(key in line for key in _OPENAI_KEYS) else _trl_pair(line)
    better, worse = found.conversations or found.texts
    if better == worse:
        raise LineError("both answers are the same; remove the example, or write one that is worse.")
    return found


def _openai_pair(line: Mapping[str, Any]) -> JudgedPrompt:
    refuse_other_keys(line, _OPENAI_KEYS, "the line")
    given = line.get("input")
    if not isinstance(given, dict):
        raise LineError(f'input is {short_repr(given)}; it must be an object; write {{"messages": [...]}}.')
    messages, tools = read_prompt(given, inside="input")
    _refuse_weights(given["messages"], "input.messages")
    return JudgedPrompt(tuple(_answered(messages, line.get(key), key) for key in _OPENAI_KEYS[1:]), tools=tools)


def _trl_pair(line: Mapping[str, Any]) -> JudgedPrompt:
    refuse_other_keys(line, _TRL_KEYS, "the line")
    chosen, rejected = line.get("chosen"), line.get("rejected")
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        return _texts(line, ("chosen", "rejected"))
    for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if not isinstance(line.get(key), list):
            raise LineError(f"{key} is {short_repr(line.get(key))}; it must be a list of messages, as {other} is.")
    prompt = line.get("prompt")
    if isinstance(prompt, list):
        messages = _messages(prompt, "prompt")
        both = tuple(_answered(messages, line[key], key) for key in ("chosen", "rejected"))
    else:  # a text repeats what the lists begin with, as in TRL
        both = _conversations(line["chosen"], line["rejected"])
    return JudgedPrompt(both, tools=read_tools(line))


def _labeled(line: Mapping[str, Any]) -> JudgedPrompt:
    label = line["label"]
    if not isinstance(label, bool):
        raise LineError(f"label is {short_repr(label)}; it must be true (a good answer) or false.")
    if "messages" in line:
        messages, tools = read_prompt({key: value for key, value in line.items() if key != "label"})
        _refuse_weights(line["messages"], "messages")
        _check_answer(messages[-1], "messages")
        return JudgedPrompt((messages,), tools=tools, label=label)
    refuse_other_keys(line, _LABELED_KEYS, "the line")
    if not isinstance(line.get("prompt"), list) and not isinstance(line.get("completion"), list):
        return _texts(line, ("completion",), label)
    messages = _answered(_messages(line.get("prompt"), "prompt"), line.get("completion"), "completion")
    return JudgedPrompt((messages,), tools=read_tools(line), label=label)


def _texts(line: Mapping[str, Any], keys: Sequence[str], label: bool | None = None) -> JudgedPrompt:
    if "tools" in line:
        raise LineError("tools belong to messages; write the prompt and the answers as lists of messages.")
    prompt = read_text(line, "prompt", "prompt")
    return JudgedPrompt(texts=tuple((prompt, read_text(line, key, key)) for key in keys), label=label)


def _messages(found: object, field: str) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise LineError(f"{field} is {short_repr(found)}; it must be a list of messages, as the answer is.")
    messages = read_messages(found, field)
    _refuse_weights(found, field)
    return messages


def _answered(prompt: tuple[Message, ...], found: object, field: str) -> tuple[Message, ...]:
    """The prompt with the one message of a list, the assistant's."""
    if not isinstance(found, list) or len(found) != 1:
        given = f"has {len(found)} messages" if isinstance(found, list) else f"is {short_repr(found)}"
        raise LineError(f"{field} {given}; it must be a list of one message, the assistant's answer.")
    (message,) = read_messages(found, field, prompt)
    _refuse_weights(found, field)
    _check_answer(message, field)
    return (*prompt, message)


def _check_answer(answer: Message, field: str) -> None:
    if answer["role"] != "assistant":
        raise LineError(f"{field}: the role of the answer is {answer['role']}; it must be assistant.")


def _conversations(chosen: Sequence[object], rejected: Sequence[object]) -> tuple[tuple[Message, ...], ...]:
    """Two conversations that differ in the last message only."""
    equal = takewhile(lambda both: both[0] == both[1], zip(chosen[:-1], rejected[:-1], strict=False))
    shared = sum(1 for _ in equal)
    if not shared:
        raise LineError("chosen and rejected begin with different messages; write the prompt as a list of messages.")
    both = []
    for field, found in (("chosen", chosen), ("rejected", rejected)):
        if len(found) != shared + 1:
            raise LineError(
                f"{field} has {len(found) - shared} messages after the {shared} that both conversations begin with; "
                "it must have one, the assistant's answer."
            )
        both.append(read_messages(found, field))
        _refuse_weights(found, field)
        _check_answer(both[-1][-1], field)
    return tuple(both)


def _refuse_weights(messages: Sequence[Any], field: str) -> None:
    for index, message in enumerate(messages):
        if message.get("weight") is not None:
            raise LineError(f"{field}[{index}] has a weight; the answers of preference data have none: remove it.")
