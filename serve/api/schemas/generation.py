"""What chat and plain completions have in common: parameters, and how they become requests to the backend."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from loramill.errors import InvalidRequest
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.api.generation.streaming import GenerationResult
from loramill.serve.api.schemas.common import Metadata, RequestBody
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.sampling_params import SamplingParams

NonEmptyText = Annotated[str, Field(min_length=1)]
#: A JSON key.
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class StreamOptions(RequestBody):
    """OpenAI's stream_options."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"include_obfuscation": (False,)}
    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        default=False, description="vLLM's: with include_usage, every chunk has the token counts of its answer so far"
    )


class GenerationRequest(RequestBody):
    """Parameters of every generation; top_k, min_p, repetition_penalty, min_tokens and ignore_eos aren't OpenAI's."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {
        "store": (False,),
        "service_tier": ("auto", "default"),
    }
    model: NonEmptyText
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(default={}, max_length=1024)
    min_tokens: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=8)
    seed: int | None = Field(default=None, ge=-(2**62), le=2**62)
    stop: list[NonEmptyText] = Field(default=[], max_length=4)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Metadata | None = None

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
        """Whether every chunk of a stream has token counts; as in vLLM, only together with `include_usage`."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_stream_options(self) -> None:
        """Raises InvalidRequest for stream_options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is for streams: set 'stream' to true.", param="stream_options")

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
    """What every object of one response says in the same words."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def for_target(cls, target: Target, prefix: str) -> ResponseEnvelope:
        """A reply with an id of its own."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", target.model, target.fingerprint)

    def object(self, kind: str, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A response object or a chunk of one."""
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
        """What surrounds the choice of each chunk in the stream that `body` asks for."""
        more = {"usage": None} if body.include_usage else {}
        whole = json.dumps(self.object(kind, [], **more), separators=(",", ":"))
        head, empty, tail = whole.rpartition('"choices":[]')
        return ChunkTemplate(f"{head}{empty[:-1]}", f"]{tail}", body.continuous_usage)


@dataclass(frozen=True, slots=True)
class ChunkTemplate:
    """The JSON around the choice of a chunk: the same for all chunks, so that it is rendered once.

    Attributes:
        continuous: whether each chunk has the token counts of its answer so far instead of `tail`'s null.
    """

    head: str
    tail: str
    continuous_usage: bool

    def render(self, choice: str, counted: GenerationResult | TextChunk) -> str:
        """The JSON of a chunk with this choice; `counted` has the tokens of the choice's answer up to here."""
        if not self.continuous_usage:
            return f"{self.head}{choice}{self.tail}"
        return f'{self.head}{choice}],"usage":{json.dumps(usage_object([counted], 1))}}}'


def usage_object(answers: Sequence[GenerationResult | TextChunk], n: int) -> dict[str, int]:
    """Token counts; a prompt with `n` answers (which follow each other) counts once."""
    prompt = sum(answer.prompt_tokens for answer in answers[::n])
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
