"""Recognizes the common formats of training data, and converts their rows to the gateway's lines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loramill.data import jsonl
from loramill.data.ingest.columnar import NotJson
from loramill.data.jsonl import parse
from loramill.errors import DatasetInvalid, InvalidRequest

Cells = Mapping[str, Any]


#: What a row says about itself, such as its topic; it is not trained.
METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A format of training data.

    Attributes:
        name: its name, for messages.
        required: fields that every row has.
        optional: fields that a row may have.
        to_line: converts the fields of a row to the gateway's line; raises CellError.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    to_line: Callable[[Cells], dict[str, Any]]

    @property
    def fields(self) -> tuple[str, ...]:
        """Required and optional fields, and the metadata that a row of any format may have."""
        return (*self.required, *self.optional, METADATA)

    def convert(self, cells: Cells) -> dict[str, Any]:
        """The gateway's line, with the texts, numbers and booleans of the metadata.

        Raises:
            CellError: what is wrong.
        """
        found = cells.get(METADATA)
        metadata = {key: value for key, value in found.items() if _is_scalar(value)} if isinstance(found, dict) else {}
        return self.to_line(cells) | ({METADATA: metadata} if metadata else {})


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


class CellError(Exception):
    """A problem of a cell: its field, and a sentence."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field, problem


def recognize(name: str, columns: Collection[str]) -> RowFormat:
    """The format with these columns.

    Raises:
        DatasetInvalid: no format matches, or several do.
    """
    found = [form for form in FORMATS if set(form.required) <= set(columns)]
    if len(found) == 1:
        return found[0]
    if found:
        either = " or ".join(",".join(f"{field}={field}" for field in form.required) for form in found)
        raise DatasetInvalid(
            f"{name} can be read as {' and as '.join(form.name for form in found)}: select columns, such as {either}."
        )
    shown = ", ".join(map(_column_name, columns)) or "(none)"
    raise DatasetInvalid(
        f"{name} has the columns {shown}, which match no known format ({'; '.join(map(_required_fields, FORMATS))}): "
        "name "
        "them, such as columns prompt=question,completion=answer."
    )


def format_of(columns: Mapping[str, str]) -> RowFormat:
    """The format of these fields, from {field: column}.

    Raises:
        InvalidRequest: the fields do not make an example.
    """
    for form in FORMATS:
        if set(form.required) <= set(columns) <= set(form.fields):
            return form
    raise InvalidRequest(
        f"The columns {', '.join(map(_column_name, columns))} don't make an example: give those of one format "
        f"({'; '.join(map(_required_fields, FORMATS))}).",
        param="columns",
    )


def _required_fields(form: RowFormat) -> str:
    return " and ".join(form.required)


# Conversion of a row of each format


def _messages(cells: Cells) -> dict[str, Any]:
    line = {"messages": _list(cells, "messages", "messages")}
    for field in ("tools", "functions", "parallel_tool_calls"):
        if (value := cells.get(field)) is not None and value != "":
            line[field] = _value(cells, field)
    if any(isinstance(message, Mapping) and "from" in message for message in line["messages"]):
        line["messages"] = _turns(line["messages"], "messages")
    return line | _label(cells)


def _pair(cells: Cells) -> dict[str, Any]:
    """Texts, or TRL's lists of messages, of which only the completion is trained or has the label."""
    spoken = {field: _is_conversation(cells[field]) for field in ("prompt", "completion")}
    if not any(spoken.values()):
        line: dict[str, Any] = {field: _text(cells, field) for field in ("prompt", "completion")}
        if cells.get("tools") not in (None, ""):
            raise CellError("tools", "tools belong to messages; write prompt and completion as lists of messages.")
        line |= {} if cells.get("weight") in (None, "") else {"weight": _number(cells, "weight")}
        return line | _label(cells)
    for field, other in (("prompt", "completion"), ("completion", "prompt")):
        if not spoken[field]:
            raise CellError(field, f"it is {short_repr(cells[field])}; it must be a list of messages, as {other} is.")
    label = _label(cells)
    before = [
        {**turn, "weight": 0} if not label and isinstance(turn, Mapping) and turn.get("role") == "assistant" else turn
        for turn in cells["prompt"]
    ]
    if cells.get("weight") not in (None, ""):
        raise CellError("weight", "it belongs to texts; give the messages of the completion a weight each.")
    tools = {} if cells.get("tools") in (None, "") else {"tools": _value(cells, "tools")}
    return {"messages": [*before, *cells["completion"]], **tools, **label}


def _openai_preference(cells: Cells) -> dict[str, Any]:
    answers = {field: _list(cells, field, "one message") for field in ("preferred_output", "non_preferred_output")}
    return {"input": _value(cells, "input"), **answers}


def _preference(cells: Cells) -> dict[str, Any]:
    """TRL's texts or lists of messages, which the gateway takes as they are."""
    line = {field: cells[field] for field in ("prompt", "chosen", "rejected") if field in cells}
    return line | ({} if cells.get("tools") in (None, "") else {"tools": _value(cells, "tools")})


def _alpaca(cells: Cells) -> dict[str, Any]:
    """As in LLaMA-Factory: the input is on the line below the instruction."""
    messages = _system(cells)
    history = [] if cells.get("history") in (None, "") else _list(cells, "history", "[question, answer] pairs")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise CellError("history", f"entry {index + 1} is {short_repr(pair)}; it must be a pair of texts.")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = [_text(cells, "instruction")]
    if cells.get("input") not in (None, ""):
        question.append(_text(cells, "input"))
    return {
        "messages": [
            *messages,
            {"role": "user", "content": "\n".join(question)},
            {"role": "assistant", "content": _text(cells, "output")},
        ]
    }


def _sharegpt(cells: Cells) -> dict[str, Any]:
    turns = _turns(_list(cells, "conversations", "turns"), "conversations")
    tools = {} if cells.get("tools") in (None, "", []) else {"tools": _wrapped(_value(cells, "tools"))}
    return {"messages": [*_system(cells), *turns], **tools}


FORMATS = (
    RowFormat("messages", ("messages",), ("tools", "functions", "parallel_tool_calls", "label"), _messages),
    RowFormat("prompt and completion", ("prompt", "completion"), ("weight", "tools", "label"), _pair),
    RowFormat("Alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    RowFormat("ShareGPT", ("conversations",), ("system", "tools"), _sharegpt),
    RowFormat("preferences", ("chosen", "rejected"), ("prompt", "tools"), _preference),
    RowFormat("OpenAI's preferences", ("input", "preferred_output", "non_preferred_output"), (), _openai_preference),
)


# ShareGPT's turns

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


def _turns(turns: list[Any], field: str) -> list[dict[str, Any]]:
    """Converts turns with `from` and `value` to messages; turns with `role` and `content` already are messages."""
    messages: list[dict[str, Any]] = []
    waiting: list[str] = []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, Mapping) or not ({"from", "role"} & set(turn)):
            raise CellError(field, f"{where} is {short_repr(turn)}; it must be an object with 'from' and 'value'.")
        if "from" not in turn:
            messages.append(dict(turn))
            continue
        messages.append(_turn(turn, where, field, index, waiting))
    return messages


def _turn(turn: Mapping[str, Any], where: str, field: str, index: int, waiting: list[str]) -> dict[str, Any]:
    """Converts one turn; `waiting` has the ids of calls without a result so far."""
    speaker, value = turn["from"], turn.get("value")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise CellError(field, f"{where}.from is {short_repr(speaker)}; it must be one of {', '.join(_ROLES)}.")
    if not isinstance(value, str):
        raise CellError(field, f"{where}.value is {short_repr(value)}; it must be text.")
    weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    if role == "call":
        calls = _calls(value, where, field, index)
        waiting += [call["id"] for call in calls]
        return {"role": "assistant", "content": None, "tool_calls": calls, **weight}
    if role == "tool":
        if not waiting:
            raise CellError(field, f"{where}.from is {speaker}, and no function_call turn before it needs a result.")
        return {"role": "tool", "tool_call_id": waiting.pop(0), "content": value}
    return {"role": role, "content": value, **weight}


def _calls(text: str, where: str, field: str, index: int) -> list[dict[str, Any]]:
    try:
        value = parse(text)
    except DatasetInvalid as error:
        raise CellError(field, f"{where}.value: {error.message} It must be a call: name and arguments.") from error
    made = []
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise CellError(field, f"{where}.value is {short_repr(call)}; it must be a call: name and arguments.")
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": text}
        made.append({"id": f"call_{index}_{number}", "type": "function", "function": function})
    return made


def _wrapped(tools: Any) -> Any:
    """Tools in OpenAI's format; ShareGPT's are often plain functions."""
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": tool} if isinstance(tool, Mapping) and "function" not in tool else tool
        for tool in tools
    ]


# Cells


def _system(cells: Cells) -> list[dict[str, Any]]:
    if cells.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": _text(cells, "system")}]


def _text(cells: Cells, field: str) -> str:
    value = cells[field]
    if value is None or value == "":
        raise CellError(field, "it is empty; fill it in, or remove the row.")
    if not isinstance(value, str):
        raise CellError(field, f"it is {short_repr(value)}; it must be text.")
    return value


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _label(cells: Cells) -> dict[str, Any]:
    """Whether the answer is good, for KTO; empty for a row without a label."""
    value = cells.get("label")
    if value is None or value == "":
        return {}
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise CellError(
            "label",
            f"it is {short_repr(value)}; it must be true (a good answer) or false. To leave the column out, select the "
            "others, such as columns prompt=prompt,completion=completion.",
        )
    return {"label": value}


def _number(cells: Cells, field: str) -> float:
    value = cells[field]
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise CellError(field, f"it is {short_repr(value)}; it must be a number.")


def _list(cells: Cells, field: str, of: str) -> list[Any]:
    value = cells[field]
    if value is None or value == "":
        raise CellError(field, "it is empty; fill it in, or remove the row.")
    value = _value(cells, field, f"write a list of {of}")
    if not isinstance(value, list):
        raise CellError(field, f"it is {short_repr(value)}; it must be a list of {of}.")
    return value


def _value(cells: Cells, field: str, advice: str = "write JSON") -> Any:
    """A cell's JSON value, which is text in tables without lists and objects."""
    value = cells[field]
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except DatasetInvalid as error:
        raise CellError(field, f"{error.message.removesuffix('.')}; {advice}.") from error


def short_repr(value: object) -> str:
    """A value of a user for a message, as `jsonl.short_repr`; the description of a `NotJson`."""
    return value.description if isinstance(value, NotJson) else jsonl.short_repr(value)


def _column_name(column: object) -> str:
    text = str(column)
    return text if text.isprintable() and len(text) <= 40 else short_repr(text)
