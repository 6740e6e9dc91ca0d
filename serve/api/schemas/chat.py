"""Chat requests and responses. `messages` has the messages of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from loramill.data.messages import CALL_END
from loramill.errors import InvalidRequest
from loramill.serve.api.schemas.common import CreatedAt, ObjectType, response_object
from loramill.serve.api.schemas.generation import (
    AnswerIndex,
    Fingerprint,
    GenerationRequest,
    ModelUsed,
    ResponseId,
    Usage,
)
from loramill.serve.api.schemas.messages import ChatMessage
from loramill.serve.api.schemas.structured_output import StructuredOutputParams


class ChatRequest(GenerationRequest, StructuredOutputParams):
    """OpenAI's chat completion request, with the parameters that are supported."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {
        **GenerationRequest.no_op_values,
        **StructuredOutputParams.no_op_values,
        "modalities": (["text"],),
    }
    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Maximum number of tokens per answer.")
    logprobs: bool = Field(default=False, description="Return log probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Number of likely tokens to return per position. Needs `logprobs`."
    )
    safety_identifier: str | None = Field(default=None, description="Accepted for compatibility, and ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Accepted for compatibility, and ignored.")

    def completion_limit(self) -> int | None:
        """Maximum number of tokens per answer.

        Raises:
            InvalidRequest: it is given twice.
        """
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' have the same meaning; give one of them.", param="max_tokens"
            )
        return self.max_completion_tokens or self.max_tokens

    def logprob_count(self) -> int | None:
        """Number of likely tokens to return per position; None: no log probabilities.

        Raises:
            InvalidRequest: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, and the end of the first call if only one is allowed and nothing else ends the answer."""
        one_call = self.usable_tools and not self.parallel_tool_calls and self.constraint() is None
        return (*super().stop_strings(), CALL_END) if one_call else super().stop_strings()


@response_object
class TopLogprob(TypedDict):
    r"""A likely token. Its text is `\xf0\x9f` if its bytes are not valid text; special tokens have no bytes."""

    token: Annotated[str, Field(description="Text of the token.")]
    logprob: Annotated[float, Field(description="Log probability in nats.")]
    bytes: Annotated[list[int] | None, Field(description="UTF-8 bytes of the token; null: a special token.")]


@response_object
class TokenLogprob(TopLogprob):
    """A generated token, with the most likely tokens at its position."""

    top_logprobs: Annotated[list[TopLogprob], Field(description="The most likely tokens, up to `top_logprobs`.")]


@response_object
class Logprobs(TypedDict):
    """Log probabilities of the tokens of an answer."""

    content: Annotated[list[TokenLogprob], Field(description="The tokens.")]
    refusal: Annotated[None, Field(description="Always null.")]


@response_object
class FunctionCallObject(TypedDict):
    """A function call. In a stream, a part of one."""

    name: NotRequired[Annotated[str, Field(description="Name of the function.")]]
    arguments: NotRequired[Annotated[str, Field(description="Arguments, as JSON.")]]


@response_object
class ToolCallObject(TypedDict):
    """A tool call. In a stream, a part of the call at `index`."""

    index: NotRequired[Annotated[int, Field(description="In streams: the call that this part belongs to.")]]
    id: NotRequired[Annotated[str, Field(description="ID of the call.")]]
    type: NotRequired[Annotated[Literal["function"], Field(description="Type of the tool.")]]
    function: Annotated[FunctionCallObject, Field(description="The function call.")]


@response_object
class AssistantMessage(TypedDict):
    """The model's message."""

    role: Annotated[Literal["assistant"], Field(description="Role of the author.")]
    content: Annotated[str | None, Field(description="Text of the message; null: there are only tool calls.")]
    refusal: Annotated[None, Field(description="Always null.")]
    tool_calls: NotRequired[Annotated[list[ToolCallObject], Field(description="Tool calls of the model.")]]


@response_object
class ChatChoice(TypedDict):
    """One answer."""

    index: AnswerIndex
    message: Annotated[AssistantMessage, Field(description="The answer.")]
    logprobs: Annotated[Logprobs | None, Field(description="Log probabilities, if requested.")]
    finish_reason: Annotated[Literal["stop", "length", "tool_calls"], Field(description="Why the answer ended.")]


@response_object
class ChatCompletion(TypedDict):
    """Answers to a conversation."""

    id: ResponseId
    object: ObjectType[Literal["chat.completion"]]
    created: CreatedAt
    model: ModelUsed
    system_fingerprint: Fingerprint
    choices: Annotated[list[ChatChoice], Field(description="The answers.")]
    usage: Annotated[Usage, Field(description="Token counts.")]


@response_object
class ChatDelta(TypedDict):
    """The next part of an answer."""

    role: NotRequired[Annotated[Literal["assistant"], Field(description="Role of the author, in the first part.")]]
    content: NotRequired[Annotated[str | None, Field(description="More text.")]]
    tool_calls: NotRequired[Annotated[list[ToolCallObject], Field(description="More of the tool calls.")]]


@response_object
class ChatChunkChoice(TypedDict):
    """A part of one answer."""

    index: AnswerIndex
    delta: Annotated[ChatDelta, Field(description="The next part of the answer.")]
    logprobs: Annotated[Logprobs | None, Field(description="Log probabilities, if requested.")]
    finish_reason: Annotated[
        Literal["stop", "length", "tool_calls"] | None, Field(description="Why the answer ended; null: it continues.")
    ]


@response_object
class ChatCompletionChunk(TypedDict):
    """A part of a streamed chat completion. With `include_usage`, the last chunk has the usage and no choices."""

    id: ResponseId
    object: ObjectType[Literal["chat.completion.chunk"]]
    created: CreatedAt
    model: ModelUsed
    system_fingerprint: Fingerprint
    choices: Annotated[list[ChatChunkChoice], Field(description="Parts of the answers.")]
    usage: NotRequired[Annotated[Usage | None, Field(description="Token counts, if requested.")]]
