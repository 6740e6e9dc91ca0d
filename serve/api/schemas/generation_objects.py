"""What generations answer, as the description tells it."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from loramill.serve.api.schemas.objects import exactly


@exactly
class Usage(TypedDict):
    """Token counts; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@exactly
class TopToken(TypedDict):
    r"""An alternative token; `\xf0\x9f` if its bytes are not text, and no bytes if it is special."""

    token: str
    logprob: float
    bytes: list[int] | None


@exactly
class ChosenToken(TopToken):
    """A token that came, with the likeliest in its place."""

    top_logprobs: list[TopToken]


@exactly
class Logprobs(TypedDict):
    """Log probabilities of an answer's tokens."""

    content: list[ChosenToken]
    refusal: None


@exactly
class AnsweredFunction(TypedDict):
    """A function's name, and its arguments as JSON."""

    name: NotRequired[str]
    arguments: NotRequired[str]


@exactly
class AnsweredCall(TypedDict):
    """A call of a tool that the model asks for; in a stream, `index` says to which call a part belongs."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: AnsweredFunction


@exactly
class AnswerMessage(TypedDict):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[AnsweredCall]]


@exactly
class ChatChoice(TypedDict):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


@exactly
class ChatCompletion(TypedDict):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@exactly
class Delta(TypedDict):
    """What an answer goes on with."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[AnsweredCall]]


@exactly
class ChatChunkChoice(TypedDict):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


@exactly
class ChatCompletionChunk(TypedDict):
    """A piece of a streamed chat completion; the last has the `usage`, if that was asked for, and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


@exactly
class CompletionLogprobs(TypedDict):
    """Log probabilities in the legacy form; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@exactly
class CompletionChoice(TypedDict):
    """One of the continuations, or in a stream a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


@exactly
class Completion(TypedDict):
    """Continuations of one prompt or several; in a stream, a piece of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
