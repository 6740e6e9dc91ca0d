"""Reads one line of chat training data in OpenAI's format, in the form that chat templates take.

`{"messages": [...], "tools": [...], "parallel_tool_calls": true}`; older lines have `functions` for `tools`, and
`function_call` and the role `function` in their messages. A key that is null, as `model_dump()` writes it, is
the same as a missing one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramill.data.jsonl import parse, short_repr
from loramill.data.messages import CALL_BEGIN, CALL_END, Message, TemplateToolCall
from loramill.errors import DatasetInvalid

#: Keys of a line of chat data.
LINE_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")

#: JSON schema of a function that names no parameters.
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

#: Largest weight of an answer's loss.
MAX_WEIGHT = 1e6
#: The same limit as for a request in serving.
MAX_TOOLS = 128

_KEYS = {
    "system": ("content", "name"),
    "developer": ("content", "name"),
    "user": ("content", "name"),
    "assistant": ("content", "name", "weight", "tool_calls", "function_call", "refusal"),
    "tool": ("content", "name", "tool_call_id"),
    "function": ("content", "name"),
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class LineError(Exception):  # examples.py turns those of a file into one DatasetInvalid
    """A problem of one line."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A line as chat templates take it.

    Attributes:
        messages: the last one, and perhaps others, are the assistant's.
        weights: loss weights of the assistant's messages, in order, at least one above 0; None if the line has none.
        tools: tools for the assistant.
    """

    messages: tuple[Message, ...]
    weights: tuple[float, ...] | None
    tools: tuple[Mapping[str, Any], ...]


def read_conversation(line: Mapping[str, Any]) -> Conversation:
    """Reads the object of a line.

    Raises:
        LineError: it is not in OpenAI's format; the message names the field and the fix.
    """
    messages, tools = read_prompt(line)
    found = line["messages"]
    weights = [
        read_weight(found[index], f"messages[{index}].weight")
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    last = len(messages) - 1
    if not weights:
        raise LineError("messages has no assistant message, which is what is trained; add one.")
    if messages[last]["role"] != "assistant":
        raise LineError(f"messages[{last}].role is {found[last]['role']}; the last message must be the assistant's.")
    return Conversation(messages, read_weights(weights), tools)


def read_prompt(
    line: Mapping[str, Any], *, inside: str = ""
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """Reads the messages of a line, whose last one may have any role, and its tools.

    Args:
        line: an object with `LINE_KEYS`.
        inside: the field of the line that the object is; empty: it is the line itself.

    Raises:
        LineError: as `read_conversation`.
    """
    line, prefix = drop_empty(line), f"{inside}." if inside else ""
    refuse_other_keys(line, LINE_KEYS, inside or "the line")
    if not isinstance(line.get("parallel_tool_calls", False), bool):
        value = short_repr(line["parallel_tool_calls"])
        raise LineError(f"{prefix}parallel_tool_calls is {value}; it must be true or false.")
    tools = read_tools(line, prefix)
    found = line.get("messages")
    if not isinstance(found, list) or not found:
        least = "a user's message; add it" if inside else "a user's and an assistant's message; add them"
        raise LineError(f"{prefix}messages must be a list with at least {least}.")
    return read_messages(found, f"{prefix}messages"), tools


def read_messages(found: Sequence[object], field: str, before: Sequence[Message] = ()) -> tuple[Message, ...]:
    """Reads messages that follow others.

    Raises:
        LineError: as `read_conversation`.
    """
    messages = [*before]
    for index, message in enumerate(found):
        messages.append(_message(message, messages, f"{field}[{index}]"))
    return tuple(messages[len(before) :])


def read_tools(line: Mapping[str, Any], prefix: str = "") -> tuple[Mapping[str, Any], ...]:
    """Reads `tools` or `functions` of an object, whose fields begin with `prefix` in messages.

    Raises:
        LineError: as `read_conversation`.
    """
    if "functions" in line and "tools" in line:
        raise LineError(f"{prefix.rstrip('.') or 'the line'} has both tools and functions; leave functions out.")
    key = "functions" if "functions" in line else "tools"
    found, field = line.get(key, []), f"{prefix}{key}"
    if not isinstance(found, list) or len(found) > MAX_TOOLS:
        raise LineError(f"{field} must be a list of at most {MAX_TOOLS} functions.")
    tools = [_tool(tool, f"{field}[{index}]", bare=key == "functions") for index, tool in enumerate(found)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LineError(f"{field} has two functions called {short_repr(twice)}; names must differ.")
    return tuple(tools)


def template_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function of OpenAI's `tools` as chat templates take it, in training and in serving.

    `strict` is left out, since it only constrains how calls are generated.
    """
    fields = {key: function.get(key) for key in ("name", "description", "parameters")}
    if fields["parameters"] is None:
        fields["parameters"] = NO_PARAMETERS
    return {"type": "function", "function": {key: value for key, value in fields.items() if value is not None}}


def answer_text(content: str, calls: Sequence[tuple[str, Any]]) -> str:
    """A message of the assistant as one text: its content, then each tool call in Hermes' format.

    Args:
        calls: name and arguments of each.
    """
    texts = [content] if content or not calls else []
    for name, arguments in calls:
        sorted_arguments = json.dumps(arguments, ensure_ascii=False, sort_keys=True)
        texts.append(f'{CALL_BEGIN}\n{{"name": "{name}", "arguments": {sorted_arguments}}}\n{CALL_END}')
    return "\n".join(texts)


def to_request_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as in a request to the chat endpoint, where arguments of calls are text."""
    return [{**message, **_to_request_calls(message)} for message in messages]


def _to_request_calls(message: Message) -> dict[str, Any]:
    if "tool_calls" not in message:
        return {}
    return {
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    }


def read_weight(value: Mapping[str, Any], field: str) -> float | None:
    """The weight of a message; None if it has none."""
    weight = value.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise LineError(f"{field} is {short_repr(weight)}; it must be a number from 0 (not trained) to {MAX_WEIGHT:g}.")
    return float(weight)


def read_weights(weights: Sequence[float | None]) -> tuple[float, ...] | None:
    """The weights of all answers of a line; None if none of them has one."""
    if all(weight is None for weight in weights):
        return None
    if not any(weight is None or weight for weight in weights):
        raise LineError(
            "weight is 0 for every answer, so that nothing is trained; give one a higher weight, or remove the example."
        )
    return tuple(1.0 if weight is None else weight for weight in weights)


def read_text(value: Mapping[str, Any], key: str, field: str, *, empty: bool = False) -> str:
    """A required text, which may be blank only if `empty` is true."""
    if key not in value:
        raise LineError(f"{field} is missing; add it.")
    text = value[key]
    if not isinstance(text, str):
        raise LineError(f"{field} is {short_repr(text)}; it must be a string.")
    if not empty and not text.strip():
        raise LineError(f"{field} is empty; write the text, or remove the example.")
    if _LONE_SURROGATE.search(text):
        raise LineError(f"{field} contains a lone surrogate (\\ud800 to \\udfff), which is invalid Unicode; remove it.")
    return text


def refuse_other_keys(value: Collection[str], allowed: Sequence[str], where: str) -> None:
    """Raises LineError if there is a key that is not `allowed`."""
    other = next((key for key in value if key not in allowed), None)
    if other is not None:
        raise LineError(f"{where} has the unknown key {short_repr(other)}; it may have {', '.join(allowed)} only.")


def drop_empty(value: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose value is neither null nor an empty list; a content and a role are always kept."""
    return {key: item for key, item in value.items() if key in ("role", "content") or item not in (None, [])}


def _message(value: object, before: Sequence[Message], where: str) -> Message:
    if not isinstance(value, dict):
        raise LineError(f'{where} must be an object; write {{"role": "...", "content": "..."}}.')
    role = value.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        raise LineError(f"{where}.role is {short_repr(role)}; use one of {', '.join(_KEYS)}.")
    fields = drop_empty(value)
    refuse_other_keys(fields, ("role", *_KEYS[role]), where)
    calls = _calls(fields, where) if role == "assistant" else []
    message: Message = {
        "role": "tool" if role == "function" else role,
        "content": _content(fields, where, empty=bool(calls) or role not in ("user", "assistant"), calls=bool(calls)),
    }
    if "name" in fields:
        message["name"] = read_text(fields, "name", f"{where}.name")
    if calls:
        message["tool_calls"] = calls
    if role in ("tool", "function"):
        message["tool_call_id"] = _answered_call_id(role, fields, before, where)
    return message


def _content(value: Mapping[str, Any], where: str, *, empty: bool, calls: bool) -> str:
    """The text of a message, its parts joined; the refusal of an assistant's message without text."""
    field, content = f"{where}.content", value.get("content")
    if content is None and "refusal" in value:
        return read_text(value, "refusal", f"{where}.refusal")
    if content is None and calls:
        return ""
    if not isinstance(content, list):
        return read_text(value, "content", field, empty=empty)
    kinds = ("text", "refusal") if value.get("role") == "assistant" else ("text",)
    texts = [_part(part, f"{field}[{index}]", kinds) for index, part in enumerate(content)]
    return read_text({"content": "".join(texts)}, "content", field, empty=empty)


def _part(part: object, field: str, kinds: Sequence[str]) -> str:
    """The text of a part of a content, whose type must be one of `kinds`."""
    kind_of_part = part.get("type") if isinstance(part, dict) else part
    kind = next((kind for kind in kinds if kind == kind_of_part), None)
    if not isinstance(part, dict) or kind is None:
        raise LineError(
            f'{field} is of the type {short_repr(kind_of_part)}; only parts like {{"type": "text", "text": "..."}} '
            "can be trained on."
        )
    refuse_other_keys(drop_empty(part), ("type", kind), field)
    return read_text(part, kind, f"{field}.{kind}", empty=True)


def _calls(value: Mapping[str, Any], where: str) -> list[TemplateToolCall]:
    if "function_call" in value:
        if "tool_calls" in value:
            raise LineError(f"{where} has both tool_calls and function_call; leave function_call out.")
        # Nine letters and digits, as Mistral's templates require.
        return [_call({"id": "call00000", "type": "function", "function": value["function_call"]}, where, "", "")]
    calls = value.get("tool_calls", [])
    if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
        raise LineError(f"{where}.tool_calls must be a list of at most {MAX_TOOLS} calls.")
    return [_call(call, where, f".tool_calls[{index}]", ".function") for index, call in enumerate(calls)]


def _call(value: object, where: str, key: str, inner: str) -> TemplateToolCall:
    field = f"{where}{key or '.function_call'}"
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        raise LineError(
            f'{field} must be an object; write {{"id": "...", "type": "function", "function": {{"name": "...", '
            '"arguments": "{...}"}}.'
        )
    refuse_other_keys(drop_empty(value), ("id", "type", "function"), field)
    function = drop_empty(value["function"])
    refuse_other_keys(function, ("name", "arguments"), f"{field}{inner}")
    return {
        "id": read_text(value, "id", f"{field}.id"),
        "type": "function",
        "function": {
            "name": _name(function, f"{field}{inner}.name"),
            "arguments": _arguments(function, f"{field}{inner}.arguments"),
        },
    }


def _arguments(function: Mapping[str, Any], field: str) -> dict[str, Any]:
    text = read_text(function, "arguments", field, empty=True)
    try:
        arguments = parse(text or "{}")
    except DatasetInvalid as error:
        raise LineError(f"{field} must be a JSON object, as text, and {error.message}") from error
    if not isinstance(arguments, dict):
        raise LineError(f"{field} is {short_repr(text)}; it must be a JSON object, as text.")
    return arguments


def _answered_call_id(role: str, value: Mapping[str, Any], before: Sequence[Message], where: str) -> str:
    """The id of the call that this message answers, in the last message that is not a result itself."""
    asking = next((message for message in reversed(before) if message["role"] != "tool"), None)
    calls = asking.get("tool_calls", []) if asking is not None else []
    if role == "tool":
        id_ = read_text(value, "tool_call_id", f"{where}.tool_call_id")
        if id_ not in [call["id"] for call in calls]:
            raise LineError(
                f"{where}.tool_call_id is {short_repr(id_)}, which the assistant's message before it does not call; a "
                "tool message must follow the tool_calls that it answers."
            )
        return id_
    name = read_text(value, "name", f"{where}.name")
    if name not in [call["function"]["name"] for call in calls]:
        raise LineError(f"{where}.name is {short_repr(name)}, which the assistant's message before it does not call.")
    return str(calls[0]["id"])


def _tool(value: object, where: str, *, bare: bool) -> Mapping[str, Any]:
    function, field = (value, where) if bare else (None, f"{where}.function")
    if isinstance(value, dict) and not bare:
        refuse_other_keys(drop_empty(value), ("type", "function"), where)
        function = value.get("function") if value.get("type") == "function" else None
    if not isinstance(function, dict):
        form = '{"name": "..."}' if bare else '{"type": "function", "function": {"name": "..."}}'
        raise LineError(f"{where} must be an object; write {form}.")
    fields = drop_empty(function)
    refuse_other_keys(fields, ("name", "description", "parameters", "strict"), field)
    _name(fields, f"{field}.name")
    if "description" in fields:
        read_text(fields, "description", f"{field}.description", empty=True)
    if not isinstance(fields.get("parameters", {}), dict):
        raise LineError(
            f"{field}.parameters is {short_repr(fields['parameters'])}; it must be a JSON schema, an object."
        )
    if not isinstance(fields.get("strict", False), bool):
        raise LineError(f"{field}.strict is {short_repr(fields['strict'])}; it must be true or false.")
    return template_tool(fields)


def _name(value: Mapping[str, Any], field: str) -> str:
    name = read_text(value, "name", field)
    if not _NAME.fullmatch(name):
        raise LineError(f"{field} is {short_repr(name)}; it has 1 to 64 letters, digits, - and _.")
    return name
