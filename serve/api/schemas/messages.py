"""Messages of chat requests, and their conversion to the messages of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, with_config
from pydantic_core import PydanticKnownError
from typing_extensions import TypedDict

from loramill.data.messages import Message, TemplateToolCall
from loramill.serve.api.schemas.common import RequestBody


class CalledFunction(RequestBody):
    """The function of a tool call."""

    name: str = Field(min_length=1, description="Name of the function.")
    arguments: str = Field(description="Arguments, as the JSON of an object.")
    parsed_arguments: Any = Field(default=None, description="Ignored. OpenAI's client adds it.")

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
    """A tool call of the assistant."""

    index: int | None = Field(default=None, description="Ignored. Streams number their calls with it.")
    id: str = Field(min_length=1, description="ID of the call.")
    type: Literal["function"] = Field(description="Type of the tool.")
    function: CalledFunction = Field(description="The called function.")

    def to_template(self) -> TemplateToolCall:
        """Returns the call as chat templates expect it."""
        arguments = json.loads(self.function.arguments or "{}")
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


@with_config(ConfigDict(extra="allow"))
class TextPart(TypedDict):
    """A text part of a content."""

    type: Annotated[Literal["text"], Field(description="Type of the part.")]
    text: Annotated[str, Field(description="The text.")]


@with_config(ConfigDict(extra="allow"))
class RefusalPart(TypedDict):
    """A refusal in an assistant's content."""

    type: Annotated[Literal["refusal"], Field(description="Type of the part.")]
    refusal: Annotated[str, Field(description="The text of the refusal.")]


class ChatMessage(RequestBody):
    """A message. Only an assistant's message with tool calls or a refusal may have no content."""

    # OpenAI's own answers have these, and clients send them back unchanged.
    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Role of the author.")
    name: str | None = Field(
        default=None, description="Distinguishes authors of one role, if the chat template renders it."
    )
    refusal: str | None = Field(default=None, description="Refusal of the assistant, used if there is no content.")
    parsed: Any = Field(default=None, description="Ignored. OpenAI's client adds it to answers.")
    tool_calls: list[MessageToolCall] = Field(default=[], max_length=128, description="Tool calls of the assistant.")
    tool_call_id: str | None = Field(
        default=None, min_length=1, validate_default=True, description="Call that a message of the role `tool` answers."
    )
    content: str | None = Field(
        default=None, validate_default=True, description="Text, or text parts, which are concatenated."
    )

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart | RefusalPart])
    @classmethod
    def _join_parts(cls, content: object, others: ValidationInfo) -> object:
        if not isinstance(content, list):
            return content
        texts = [_text(part, refuses=others.data.get("role") == "assistant") for part in content]
        if None in texts:
            raise ValueError('only parts like {"type": "text", "text": "…"} are supported')
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
            raise ValueError("only messages of the role 'assistant' may have it")
        return value

    @field_validator("tool_calls")
    @classmethod
    def _only_assistant_calls_tools(cls, calls: list[MessageToolCall], others: ValidationInfo) -> list[MessageToolCall]:
        if calls and others.data.get("role") != "assistant":
            raise ValueError("only messages of the role 'assistant' may have tool calls")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _only_for_tool(cls, id_: str | None, others: ValidationInfo) -> str | None:
        if id_ is None and others.data.get("role") == "tool":
            raise PydanticKnownError("missing")
        if id_ is not None and others.data.get("role") != "tool":
            raise ValueError("only messages of the role 'tool' may have it")
        return id_

    def to_template(self) -> Message:
        """Returns the message as chat templates expect it. A refusal replaces a missing content."""
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
    """Returns a part's text if the part is supported. Null keys are ignored."""
    match part:
        case {"type": "text", "text": str(text), **rest} if not _has_values(rest):
            return text
        case {"type": "refusal", "refusal": str(text), **rest} if refuses and not _has_values(rest):
            return text
    return None


def _has_values(rest: Mapping[Any, object]) -> bool:
    return any(value is not None for value in rest.values())
