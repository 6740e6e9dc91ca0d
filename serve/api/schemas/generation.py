"""What chat and plain completions have in common: parameters, requests to the backend, and response objects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator
from typing_extensions import TypedDict

from loramill.errors import InvalidRequest
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.api.generation.streaming import GenerationResult
from loramill.serve.api.schemas.common import Metadata, RequestBody, response_object
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.types.sampling import MaxTokens, Temperature, TopP

NonEmptyText = Annotated[str, Field(min_length=1)]
#: A token's id as the key of a JSON object.
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]

ResponseId = Annotated[str, Field(description="ID of the response.")]
ModelUsed = Annotated[str, Field(description="The model, as named in the request.")]
Fingerprint = Annotated[str, Field(description="Identifies the base model's weights and the adapter's version.")]
AnswerIndex = Annotated[int, Field(description="Index of the answer.")]


@response_object
class Usage(TypedDict):
    """Token counts. A prompt with several answers counts once."""

    prompt_tokens: Annotated[int, Field(description="Number of tokens in the prompts.")]
    completion_tokens: Annotated[int, Field(description="Number of generated tokens.")]
    total_tokens: Annotated[int, Field(description="Sum of both.")]


class StreamOptions(RequestBody):
    """Options of a stream."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"include_obfuscation": (False,)}
    include_usage: bool = Field(default=False, description="End the stream with a chunk of token counts.")
    continuous_usage_stats: bool = Field(
        default=False,
        description="Include the token counts so far in every chunk, as in vLLM. Needs `include_usage`.",
    )


class GenerationRequest(RequestBody):
    """Parameters of all generations.

    `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and `ignore_eos` extend OpenAI's API as in vLLM.
    """

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"service_tier": ("auto", "default")}
    model: NonEmptyText = Field(description="The base, `tenant/adapter` or `tenant/adapter@version`.")
    max_tokens: MaxTokens = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: int = Field(default=0, ge=0, description="Sample from this number of most likely tokens; 0: from all.")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Minimum probability of a token, relative to the most likely one."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, le=10.0, description="Divides the logits of tokens in the prompt or answer; 1: no penalty."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="Subtracted from the logits of tokens that occur in the answer."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="Subtracted from a token's logit per occurrence in the answer."
    )
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default={}, max_length=1024, description="Added to the logits of tokens, by token id."
    )
    min_tokens: int = Field(default=0, ge=0, description="Minimum number of tokens per answer.")
    n: int = Field(default=1, ge=1, le=8, description="Number of answers per prompt.")
    seed: int | None = Field(
        default=None, ge=-(2**62), le=2**62, description="Seed of the sampling. Answer i of a prompt uses seed + i."
    )
    stop: list[NonEmptyText] = Field(default=[], max_length=4, description="Strings that end an answer.")
    ignore_eos: bool = Field(default=False, description="Continue the answer after an end-of-sequence token.")
    stream: bool = Field(default=False, description="Return server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Options of a stream.")
    store: bool = Field(
        default=False,
        description="Store the completion, for the tenant's retention time. Refused if the tenant has not consented.",
    )
    user: str | None = Field(
        default=None,
        description="Your user. During a canary, each gets answers of one version. With `store`, all that is stored of "
        "a user can be deleted.",
    )
    metadata: Metadata | None = Field(
        default=None, description="Up to 16 pairs of strings, by which stored completions can be listed."
    )

    @field_validator("stop", mode="before", json_schema_input_type=NonEmptyText | list[NonEmptyText])
    @classmethod
    def _as_list(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has token counts. As in vLLM, this needs `include_usage`."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_stream_options(self) -> None:
        """Raises InvalidRequest if there are stream_options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream' to be true.", param="stream_options")

    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return tuple(self.stop)

    def text_request(
        self,
        reply: ResponseEnvelope,
        target: Target,
        *,
        index: int,
        max_tokens: int | None,
        logprobs: int | None,
        echo: bool,
        **fields: Any,
    ) -> TextRequest:
        """Builds the request for the answer `index`; `fields` holds `messages` or `prompt`, and what goes with it."""
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            min_tokens=self.min_tokens,
            # Answers to the same prompt differ, and each can be reproduced by its own seed.
            seed=None if self.seed is None else self.seed + index % self.n,
            logprobs=logprobs,
            echo=echo,
        )
        return TextRequest(
            id=f"{reply.id}-{index}",
            tenant=target.tenant,
            version=target.version,
            sampling_params=params,
            stop=self.stop_strings(),
            ignore_eos=self.ignore_eos,
            **fields,
        )


@dataclass(frozen=True, slots=True)
class ResponseEnvelope:
    """The fields that all objects of one response share."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def for_target(cls, target: Target, prefix: str) -> ResponseEnvelope:
        """Returns an envelope with a new id."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", target.model, target.fingerprint)

    def object(self, kind: str, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """Returns a response object or a chunk of one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
            **more,
        }

    def chunk_template(self, kind: str, body: GenerationRequest) -> ChunkTemplate:
        """Returns the JSON around the choices of a stream that `body` requests."""
        more = {"usage": None} if body.include_usage else {}
        whole = json.dumps(self.object(kind, [], **more), separators=(",", ":"))
        head, empty, tail = whole.rpartition('"choices":[]')
        return ChunkTemplate(f"{head}{empty[:-1]}", f"]{tail}", body.continuous_usage)


@dataclass(frozen=True, slots=True)
class ChunkTemplate:
    """The JSON around the choice of a chunk. It is the same for all chunks, so it is rendered once.

    Attributes:
        head: the JSON before the choice.
        tail: the JSON after the choice.
        continuous: whether each chunk has the token counts of its answer so far, instead of the null in `tail`.
    """

    head: str
    tail: str
    continuous_usage: bool

    def render(self, choice: str, counted: GenerationResult | TextChunk) -> str:
        """Returns the JSON of a chunk with this choice; `counted` has the token counts of the answer so far."""
        if not self.continuous_usage:
            return f"{self.head}{choice}{self.tail}"
        return f'{self.head}{choice}],"usage":{json.dumps(usage_object([counted], 1))}}}'


def usage_object(answers: Sequence[GenerationResult | TextChunk], n: int) -> dict[str, int]:
    """Returns token counts. A prompt with `n` adjacent answers counts once."""
    prompt = sum(answer.prompt_tokens for answer in answers[::n])
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
