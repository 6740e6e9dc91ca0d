"""Detects what a chat template supports: renders marker words and looks for them in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from loramill.data.chat_template.dialect import TemplateRefusedError, tojson

_MARKER, _NAME, _KEY = "qwordq", "qnameq", "qkeyq"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}

#: Mistral's templates accept only ids of nine letters and digits.
_TOOL_CALL_CONVERSATION: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _MARKER}}}
        ],
    },
    {"role": "tool", "content": "qresultq", "tool_call_id": "abcdefghi", "name": _NAME},
)


@dataclass(frozen=True, slots=True)
class TemplateSupport:
    """What a template supports, detected by rendering marker words.

    Attributes:
        refusal: why the template can't render any conversation.
        parts: roles whose content must be a list of parts, since the template drops plain text.
        dropped: roles whose text the template drops in either form.
        developer: whether the template has the role "developer".
        tools: whether it renders tools.
        tool_calls: whether it renders tool calls of the assistant and their results.
        json_arguments: whether the arguments of a call must be JSON text; other templates take an object.
        rendered_tool: a tool as the template renders it.
    """

    refusal: str | None = None
    parts: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    developer: bool = False
    tools: bool = False
    tool_calls: bool = False
    json_arguments: bool = False
    rendered_tool: str = ""


class Render(Protocol):
    """Renders a conversation up to where the assistant's answer begins; raises TemplateRefusedError."""

    def __call__(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()) -> str: ...


def adapt_message(message: Mapping[str, Any], support: TemplateSupport) -> dict[str, Any]:
    """A message in the form that the template takes."""
    made = dict(message)
    if made["role"] == "developer" and not support.developer:
        made["role"] = "system"
    if made["role"] in support.parts:
        made["content"] = [{"type": "text", "text": made["content"]}]
    if support.json_arguments and made.get("tool_calls"):
        made["tool_calls"] = [_with_json_arguments(call) for call in made["tool_calls"]]
    return made


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = tojson(call["function"]["arguments"])
    return {**call, "function": {**call["function"], "arguments": arguments}}


def detect_support(render: Render, source: str) -> TemplateSupport:
    """Renders a marker as each role, as text and as a part, and looks for it in the result.

    A role that the template refuses, such as "system" in Gemma's, is neither dropped nor in parts: a request with such
    a message gets the template's error.

    Args:
        render: renders the template.
        source: the template's text.
    """
    refusal, users = _refusal_reason(render), _content_form(render, "user")
    if users is None and refusal:
        return TemplateSupport(refusal=refusal)
    forms = {"user": users, **{role: _content_form(render, role, users) for role in ("assistant", "system")}}
    developer = "developer" in source and _content_form(render, "developer", users) == "text"
    parts = frozenset(role for role, form in forms.items() if form == "parts")
    found = TemplateSupport(
        parts=parts | ({"tool"} if "assistant" in parts and "user" in parts else frozenset()),
        dropped=frozenset(role for role, form in forms.items() if form == "dropped"),
        developer=developer,
    )
    return _detect_tool_support(render, found)


def _refusal_reason(render: Render) -> str | None:
    """Why a user's message can be rendered neither alone nor after a system message; None if it can."""
    user, system = _message("user", _MARKER), _message("system", _MARKER)
    reason = None
    for messages in ([user], [system, user]):
        try:
            render(messages)
            return None
        except TemplateRefusedError as error:
            reason = reason or str(error)
    return reason


def _content_form(render: Render, role: str, users: str | None = "text") -> str | None:
    """How a role's content is read: as "text" or "parts", or "dropped"; None: the template refuses such a message."""
    seen = None
    for form in ("text", "parts"):
        other = _message("user", "Hi", "parts" if users == "parts" else "text")
        mine = _message(role, _MARKER, form)
        conversation = {"user": [mine], "assistant": [other, mine, other]}.get(role, [mine, other])
        try:
            text = render(conversation)
        except TemplateRefusedError:
            continue
        if _MARKER in text.lower():
            return form
        seen = "dropped"
    return seen


def _message(role: str, text: str, form: str = "text") -> dict[str, Any]:
    return {"role": role, "content": text if form == "text" else [{"type": "text", "text": text}]}


def _detect_tool_support(render: Render, found: TemplateSupport) -> TemplateSupport:
    user = adapt_message(_message("user", "Hi"), found)
    rendered = _render_with_tool(render, [user])
    calls, json_arguments = False, False
    for as_json in (False, True):
        form = TemplateSupport(parts=found.parts, json_arguments=as_json)
        text = _render_with_tool(render, [adapt_message(message, form) for message in _TOOL_CALL_CONVERSATION])
        if _NAME in text and _MARKER in text and f"'{_KEY}': " not in text and "qresultq" in text:
            calls, json_arguments = True, as_json
            break
    return replace(
        found, tools=_NAME in rendered, tool_calls=calls, json_arguments=json_arguments, rendered_tool=rendered
    )


def _render_with_tool(render: Render, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return render(messages, tools=[_TOOL])
    except TemplateRefusedError:
        return ""
