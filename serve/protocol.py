"""What the gateway and an engine replica say to each other: plain values, no HTTP, no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from loramill.data.tokenizer import Message
from loramill.serve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """What a whole answer must be: JSON, or calls of tools, or one of the two if both are given.

    Attributes:
        param: the parameter that asks for it.
        schema: JSON schema of an answer in JSON; None: it may not be in JSON.
        calls: JSON schema of the arguments of each tool that may be called, by its name.
        several: whether there may be more than one call.
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


@dataclass(frozen=True, slots=True)
class TokenText:
    r"""A token with its log probability; the first of an echoed prompt has none.

    Attributes:
        text: as it is shown; `\xf0\x9f` if `raw` is not UTF-8, and its name if it is special.
        logprob: in nats.
        raw: the bytes that it adds to the answer's text; None: it is special and adds none.
    """

    text: str
    logprob: float | None
    raw: bytes | None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that was chosen and the most probable alternatives."""

    token: TokenText
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class TextChunk:
    """The part of an answer that became ready together.

    `finish` is "stop" or "length" on the last chunk and None before. The counts are totals so far.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str | None = None
    logprobs: tuple[SampledToken, ...] = ()


class GenerationBackend(Protocol):
    """What generates text for the gateway: an engine replica, near or behind a Ray Serve handle."""

    def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer; closing the iterator cancels it. Raises errors of `loramill.errors`."""
        ...

    async def ready(self) -> None:
        """Returns when requests can be answered; raises Unavailable with the reason otherwise."""
        ...
