"""Stored completions, and the ratings and corrections of their answers."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from loramill.types.base import FrozenModel


class CompletionKind(StrEnum):
    """Kind of a stored completion: the type of its object in the API."""

    CHAT = "chat.completion"
    TEXT = "text_completion"


class Rating(StrEnum):
    """Whether an answer is good."""

    GOOD = "good"
    BAD = "bad"


class CompletionStorage(FrozenModel):
    """Whether a tenant's completions may be stored, and for how long."""

    store_completions: bool = Field(
        default=False, description="Whether completions are stored whose request has `store: true`."
    )
    completion_days: float | None = Field(
        default=None,
        gt=0,
        le=36_500,
        allow_inf_nan=False,
        description="Days for which its completions are stored. Null: the setting `completion_days`.",
    )


class CompletionRecord(FrozenModel):
    """A stored completion.

    Attributes:
        adapter: `tenant/adapter`; None: the base alone.
        version: the adapter's version that answered.
        model: the model as the request names it.
        user: the `user` of the request.
        request: `messages` and `tools` of a chat completion, `prompts` of a text completion, and the answers per
            prompt (`n`).
        response: the response object, without log probabilities.
        created_at: in seconds since the epoch.
    """

    id: str
    kind: CompletionKind
    tenant: str
    adapter: str | None
    version: str | None
    model: str
    user: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    request: dict[str, Any]
    response: dict[str, Any]
    created_at: float


class FeedbackRecord(FrozenModel):
    """The rating and the correction of one answer of a stored completion."""

    id: str = Field(description="ID of the feedback.")
    tenant: str = Field(description="Tenant of the completion.")
    completion_id: str = Field(description="ID of the stored completion.")
    choice: int = Field(description="Index of the answer among the choices.")
    model: str = Field(description="The model, as named in the request.")
    adapter: str | None = Field(description="Name of the adapter. Null: the base alone.")
    version: str | None = Field(description="Version of the adapter that answered. Null: the base alone.")
    user: str | None = Field(description="The `user` of the request.")
    rating: Rating | None = Field(description="Whether the answer is good. Null: it was not rated.")
    correction: str | None = Field(description="The answer as it should have been. Null: it was not corrected.")
    reason: str | None = Field(description="Why.")
    created_at: float = Field(description="When it was first given, in seconds since the epoch.")
    updated_at: float = Field(description="When it was last changed, in seconds since the epoch.")
    example_used_at: float | None = Field(
        description="When a nightly run made an example of the correction, in seconds since the epoch."
    )
    example_file: str | None = Field(description="File with that example. Null: it is not in one.")
    pair_used_at: float | None = Field(
        description="When a nightly run made a preference pair of it, in seconds since the epoch."
    )
    pair_file: str | None = Field(description="File with that pair. Null: it is not in one.")


class CompletionDeletion(FrozenModel):
    """What a deletion of stored completions and feedback removed, and what it could not remove."""

    completions: int = Field(description="Number of deleted completions.")
    feedback: int = Field(description="Number of deleted ratings and corrections.")
    files: tuple[str, ...] = Field(
        description="Files of nightly runs that have examples of them. They stay, as do the versions trained on them."
    )
