"""Messages of a conversation, in the form that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

ROLES = ("system", "user", "assistant")

#: All roles of a message; "developer" becomes "system" for a template without that role.
TEMPLATE_ROLES = (*ROLES, "developer", "tool")

#: How a model calls a tool, as Hermes and Qwen have it: JSON with `name` and `arguments` between these.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"


class FunctionCall(TypedDict):
    """A call of a function; `arguments` is an object, as templates expect it, and not OpenAI's text."""

    name: str
    arguments: dict[str, Any]


class TemplateToolCall(TypedDict):
    """A tool call of the assistant; `type` is "function"."""

    id: str
    type: str
    function: FunctionCall


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
        role: one of `TEMPLATE_ROLES`; "tool" for the result of the call `tool_call_id`.
        name: distinguishes participants of one role; most templates ignore it.
    """

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[TemplateToolCall]]
    tool_call_id: NotRequired[str]


def first_tool_param(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The first parameter of a conversation that needs a template with tools; None if there is none."""
    if tools:
        return "tools"
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            return f"messages[{index}].role"
        if message.get("tool_calls"):
            return f"messages[{index}].tool_calls"
    return None
