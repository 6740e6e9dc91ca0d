"""What gateways and engine replicas exchange: plain values, without HTTP and Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from loramill.data.messages import Message
from loramill.serve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """What the whole answer must match: a JSON schema, or tool calls; either of them if both are set.

    Attributes:
        param: the request parameter that sets the constraint.
        schema: JSON schema of an answer in JSON; None: no such answer is allowed.
        tool_schemas: JSON schema of the arguments of each tool that may be called, by name.
        parallel_tool_calls: whether more than one call is allowed.
    """

    param: str
    schema: Mapping[str, Any] | None = None
    tool_schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel_tool_calls: bool = False


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One answer to generate. Exactly one of `messages` and `prompt` is set.

    Attributes:
        version: the adapter's identity, resolved and pinned by the gateway; None: the base alone.
        prompt: text or token ids to continue.
        sampling_params: how tokens are sampled; its `n` is 1, and the replica sets its `stop_ids`.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: continue after the base's stop tokens.
        tools: JSON schemas of tools, as the chat template renders them.
        constraint: what the whole answer must match; it ends where nothing can follow.
        priority: a higher priority runs first.
    """

    id: str
    tenant: str
    version: str | None = None
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    sampling_params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0))
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    constraint: OutputConstraint | None = None
    priority: int = 0


class TokenText(NamedTuple):
    r"""A token with its log probability. A tuple, so that chunks are packed as they are.

    Attributes:
        text: the token's text; `\xf0\x9f` if `raw` is not UTF-8; the name of a special token.
        logprob: in nats; None for the first token of an echoed prompt.
        raw: the bytes that the token adds to the answer's text; None for a special token, which adds none.
    """

    text: str
    logprob: float | None
    raw: bytes | None


class SampledToken(NamedTuple):
    """The token that was sampled, and the most probable tokens in its place."""

    token: TokenText
    top: tuple[TokenText, ...] = ()


class TextChunk(NamedTuple):
    """A part of an answer: what became ready together.

    Attributes:
        prompt_tokens: number of the prompt's tokens.
        completion_tokens: number of the answer's tokens so far.
        finish: "stop" or "length" for the last chunk, None before.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str | None = None
    logprobs: tuple[SampledToken, ...] = ()


class GenerationBackend(Protocol):
    """What generates text for a gateway: an engine replica, in this process or behind a Ray Serve handle."""

    def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer; closing the iterator cancels it.

        Raises:
            LoramillError: the answer cannot be generated.
        """
        ...

    async def ready(self) -> None:
        """Returns if requests can be answered; raises Unavailable with the reason otherwise."""
        ...
