"""The messages of a chat request, and how they become those that chat templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, with_config
from pydantic_core import PydanticKnownError
from typing_extensions import TypedDict

from loramill.data.messages import Message, TemplateToolCall
from loramill.serve.api.schemas.common import RequestBody


class CalledFunction(RequestBody):
    """The function that was called; `arguments` is a JSON object as text. OpenAI's client adds `parsed_arguments`,
    which is ignored."""

    name: str = Field(min_length=1)
    arguments: str
    parsed_arguments: Any = None

    @field_validator("arguments")
    @classmethod
    def _require_json_object(cls, arguments: str) -> str:
        try:
            good = isinstance(json.loads(arguments or "{}"), dict)
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise ValueError("must be a JSON object, as text")
        return arguments


class MessageToolCall(RequestBody):
    """A tool call of the assistant; `index` is its position in a stream's deltas, and is ignored."""

    index: int | None = None
    id: str = Field(min_length=1)
    type: Literal["function"]
    function: CalledFunction

    def to_template(self) -> TemplateToolCall:
        """As chat templates know it."""
        arguments = json.loads(self.function.arguments or "{}")
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


@with_config(ConfigDict(extra="allow"))
class TextPart(TypedDict):
    """A piece of a content."""

    type: Literal["text"]
    text: str


@with_config(ConfigDict(extra="allow"))
class RefusalPart(TypedDict):
    """A refusal in an assistant's content."""

    type: Literal["refusal"]
    refusal: str


class ChatMessage(RequestBody):
    """A message; the text parts of its content are joined. Only an assistant that calls tools or refuses may have none.

    `name` tells participants of one role apart, if the chat template renders it. OpenAI's client adds `parsed` to an
    answer; it is ignored.
    """

    # What OpenAI's own answers carry, and callers send back as they got it.
    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    refusal: str | None = None
    parsed: Any = None
    tool_calls: list[MessageToolCall] = Field(default=[], max_length=128)
    tool_call_id: str | None = Field(default=None, min_length=1, validate_default=True)
    content: str | None = Field(default=None, validate_default=True)

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart | RefusalPart])
    @classmethod
    def _join_parts(cls, content: object, others: ValidationInfo) -> object:
        if not isinstance(content, list):
            return content
        texts = [_text(part, refuses=others.data.get("role") == "assistant") for part in content]
        if None in texts:
            raise ValueError('only parts like {"type": "text", "text": "…"} are understood')
        return "".join(text for text in texts if text is not None)

    @field_validator("content")
    @classmethod
    def _require_content(cls, content: str | None, others: ValidationInfo) -> str | None:
        if content is None and not others.data.get("tool_calls") and others.data.get("refusal") is None:
            raise PydanticKnownError("missing")
        return content

    @field_validator("refusal", "parsed")
    @classmethod
    def _only_for_assistant(cls, value: Any, others: ValidationInfo) -> Any:
        if value is not None and others.data.get("role") != "assistant":
            raise ValueError("only a message of the role 'assistant' may have it")
        return value

    @field_validator("tool_calls")
    @classmethod
    def _only_assistant_calls_tools(cls, calls: list[MessageToolCall], others: ValidationInfo) -> list[MessageToolCall]:
        if calls and others.data.get("role") != "assistant":
            raise ValueError("only the assistant calls tools")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _only_for_tool(cls, id_: str | None, others: ValidationInfo) -> str | None:
        if id_ is None and others.data.get("role") == "tool":
            raise PydanticKnownError("missing")
        if id_ is not None and others.data.get("role") != "tool":
            raise ValueError("only a message of the role 'tool' has it")
        return id_

    def to_template(self) -> Message:
        """The form that chat templates take; a refusal is the content of a message without any."""
        content = self.refusal if self.content is None else self.content
        message: Message = {"role": self.role, "content": content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [each.to_template() for each in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _text(part: object, *, refuses: bool) -> str | None:
    """A part's text, if the part is supported; null keys are ignored."""
    match part:
        case {"type": "text", "text": str(text), **rest} if not _given(rest):
            return text
        case {"type": "refusal", "refusal": str(text), **rest} if refuses and not _given(rest):
            return text
    return None


def _given(rest: Mapping[Any, object]) -> bool:
    return any(value is not None for value in rest.values())
