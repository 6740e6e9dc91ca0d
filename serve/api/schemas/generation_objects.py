"""What generations answer, as the description tells it."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from loramill.serve.api.schemas.objects import no_extra_keys


@no_extra_keys
class Usage(TypedDict):
    """Token counts; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@no_extra_keys
class TopLogprob(TypedDict):
    r"""An alternative token; `\xf0\x9f` if its bytes are not text, and no bytes if it is special."""

    token: str
    logprob: float
    bytes: list[int] | None


@no_extra_keys
class TokenLogprob(TopLogprob):
    """A token that came, with the likeliest in its place."""

    top_logprobs: list[TopLogprob]


@no_extra_keys
class Logprobs(TypedDict):
    """Log probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


@no_extra_keys
class FunctionCallObject(TypedDict):
    """A function's name, and its arguments as JSON."""

    name: NotRequired[str]
    arguments: NotRequired[str]


@no_extra_keys
class ToolCallObject(TypedDict):
    """A call of a tool that the model asks for; in a stream, `index` says to which call a part belongs."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallObject


@no_extra_keys
class AssistantMessage(TypedDict):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallObject]]


@no_extra_keys
class ChatChoice(TypedDict):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


@no_extra_keys
class ChatCompletion(TypedDict):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@no_extra_keys
class ChatDelta(TypedDict):
    """What an answer goes on with."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallObject]]


@no_extra_keys
class ChatChunkChoice(TypedDict):
    """A piece of one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


@no_extra_keys
class ChatCompletionChunk(TypedDict):
    """A piece of a streamed chat completion; the last has the `usage`, if that was asked for, and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


@no_extra_keys
class CompletionLogprobs(TypedDict):
    """Log probabilities in the legacy form; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@no_extra_keys
class CompletionChoice(TypedDict):
    """One of the continuations, or in a stream a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


@no_extra_keys
class Completion(TypedDict):
    """Continuations of one prompt or several; in a stream, a piece of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
