"""Completion requests and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import Field, field_validator
from typing_extensions import TypedDict

from loramill.errors import InvalidRequest
from loramill.serve.api.schemas.common import CreatedAt, ObjectType, response_object
from loramill.serve.api.schemas.generation import (
    AnswerIndex,
    Fingerprint,
    GenerationRequest,
    ModelUsed,
    NonEmptyText,
    ResponseId,
    Usage,
)

Tokens = Annotated[list[int], Field(min_length=1)]

#: Maximum number of prompts per request.
MAX_PROMPTS = 128
Prompts = Annotated[list[NonEmptyText | Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(GenerationRequest):
    """OpenAI's legacy completion request, with the parameters that are supported."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {
        **GenerationRequest.no_op_values,
        "best_of": (1,),
        "suffix": ("",),
    }
    prompt: Prompts = Field(description="One prompt or several, as text or as token ids.")
    max_tokens: int = Field(default=16, ge=0, description="Maximum number of tokens per answer.")  # OpenAI's default
    echo: bool = Field(default=False, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(
        default=None, ge=0, le=5, description="Return log probabilities, with this number of alternatives per token."
    )

    @field_validator("prompt", mode="before", json_schema_input_type=NonEmptyText | Tokens | Prompts)
    @classmethod
    def _as_prompts(cls, prompt: object) -> object:
        one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
        return [prompt] if one else prompt

    def check_max_tokens(self) -> None:
        """Raises InvalidRequest if nothing would be generated or echoed."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("'max_tokens' is 0, which is only useful with 'echo'.", param="max_tokens")


@response_object
class CompletionLogprobs(TypedDict):
    """Log probabilities in the legacy format. The first token of an echoed prompt has none."""

    tokens: Annotated[list[str], Field(description="The tokens.")]
    token_logprobs: Annotated[list[float | None], Field(description="Log probability of each token.")]
    top_logprobs: Annotated[
        list[dict[str, float] | None], Field(description="The most likely tokens at each position.")
    ]
    text_offset: Annotated[list[int], Field(description="Position of each token in the text, in characters.")]


@response_object
class CompletionChoice(TypedDict):
    """One answer, or in a stream a part of one."""

    index: AnswerIndex
    text: Annotated[str, Field(description="The generated text.")]
    logprobs: Annotated[CompletionLogprobs | None, Field(description="Log probabilities, if requested.")]
    finish_reason: Annotated[
        Literal["stop", "length"] | None, Field(description="Why the answer ended; null: it continues.")
    ]


@response_object
class Completion(TypedDict):
    """Answers to one prompt or several; in a stream, a part of them."""

    id: ResponseId
    object: ObjectType[Literal["text_completion"]]
    created: CreatedAt
    model: ModelUsed
    system_fingerprint: Fingerprint
    choices: Annotated[list[CompletionChoice], Field(description="The answers. Those to one prompt are adjacent.")]
    usage: NotRequired[Annotated[Usage | None, Field(description="Token counts. Optional in streams.")]]
