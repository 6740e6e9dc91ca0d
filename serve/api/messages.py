"""The messages of a chat request, and how they become those that chat templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, with_config
from pydantic_core import PydanticKnownError
from typing_extensions import TypedDict

from loramill.chat import Message, ToolCall
from loramill.serve.api.wire import Body


class CalledFunction(Body):
    """The function that was called; `arguments` is a JSON object, as text."""

    name: str = Field(min_length=1)
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, arguments: str) -> str:
        try:
            good = isinstance(json.loads(arguments or "{}"), dict)
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise ValueError("must be a JSON object, as text")
        return arguments


class MessageToolCall(Body):
    """A call of a tool that the assistant asked for."""

    id: str = Field(min_length=1)
    type: Literal["function"]
    function: CalledFunction

    def call(self) -> ToolCall:
        """As chat templates know it."""
        arguments = json.loads(self.function.arguments or "{}")
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


@with_config(ConfigDict(extra="allow"))
class TextPart(TypedDict):
    """A piece of a content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message; text parts of a content are joined. Only who calls tools may say nothing else."""

    # What OpenAI's own answers carry, and callers send back as they got it.
    asks_nothing: ClassVar[Mapping[str, Sequence[Any]]] = {"annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[MessageToolCall] = Field(default=[], max_length=128)
    tool_call_id: str | None = Field(default=None, min_length=1, validate_default=True)
    content: str | None = Field(default=None, validate_default=True)

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart])
    @classmethod
    def _joined(cls, content: object) -> object:
        if not isinstance(content, list):
            return content
        texts = [part["text"] for part in content if _is_text(part)]
        if len(texts) < len(content):
            raise ValueError('only parts like {"type": "text", "text": "…"} are understood')
        return "".join(texts)

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: str | None, others: ValidationInfo) -> str | None:
        if content is None and not others.data.get("tool_calls"):
            raise PydanticKnownError("missing")
        return content

    @field_validator("tool_calls")
    @classmethod
    def _are_the_assistants(cls, calls: list[MessageToolCall], others: ValidationInfo) -> list[MessageToolCall]:
        if calls and others.data.get("role") != "assistant":
            raise ValueError("only the assistant calls tools")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _is_a_tools(cls, id_: str | None, others: ValidationInfo) -> str | None:
        if id_ is None and others.data.get("role") == "tool":
            raise PydanticKnownError("missing")
        if id_ is not None and others.data.get("role") != "tool":
            raise ValueError("only a message of the role 'tool' has it")
        return id_

    def message(self) -> Message:
        """As chat templates know it."""
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [each.call() for each in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _is_text(part: object) -> bool:
    match part:
        case {"type": "text", "text": str(), **rest}:
            return not rest
    return False
