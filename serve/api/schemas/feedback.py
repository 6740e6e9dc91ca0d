"""Stored completions and feedback: requests, queries and response objects."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from loramill.serve.api.schemas.chat import AssistantMessage, ChatCompletion
from loramill.serve.api.schemas.common import (
    ALL_FIELDS,
    Deleted,
    ListQuery,
    Metadata,
    ObjectType,
    RequestBody,
    response_object,
    without_nul,
)
from loramill.serve.api.schemas.completions import Completion
from loramill.serve.api.schemas.metadata_query import MetadataQuery
from loramill.types import CompletionDeletion, FeedbackRecord, Rating

Order = Literal["asc", "desc"]
#: Ratings as words, or as numbers.
_RATINGS = {"good": Rating.GOOD, "bad": Rating.BAD, 1: Rating.GOOD, -1: Rating.BAD}


def _refuse_boolean(rating: object) -> object:
    if isinstance(rating, bool):
        raise ValueError("write good, bad, 1 or -1")  # in Python, true equals 1
    return rating


class CompletionListQuery(MetadataQuery):
    """The query of the list of stored completions."""

    model: str | None = Field(default=None, description="Model that the completions must be of, as requested.")
    order: Order = Field(default="asc", description="Oldest (asc) or newest (desc) first.")


class MessageListQuery(ListQuery):
    """The query of the list of a stored completion's messages."""

    order: Order = Field(default="asc", description="First (asc) or last (desc) message first.")


class CompletionUpdate(RequestBody):
    """A change of a stored completion."""

    metadata: Metadata = Field(default={}, description="The new metadata; it replaces the old.")


class FeedbackRequest(RequestBody):
    """The rating or the correction of an answer, or both. It replaces what was given before."""

    completion_id: str = Field(min_length=1, description="ID of the stored completion.")
    choice: int = Field(default=0, ge=0, description="Index of the answer among the choices.")
    rating: Annotated[Literal["good", "bad", 1, -1], BeforeValidator(_refuse_boolean)] | None = Field(
        default=None, description="Whether the answer is good; 1 means good and -1 bad."
    )
    correction: Annotated[str, AfterValidator(without_nul), Field(max_length=1_000_000)] | None = Field(
        default=None, description="The answer as it should have been."
    )
    reason: Annotated[str, AfterValidator(without_nul), Field(max_length=10_000)] | None = Field(
        default=None, description="Why; it is kept, and not trained on."
    )

    @model_validator(mode="after")
    def _require_one(self) -> FeedbackRequest:
        if self.rating is None and self.correction is None:
            raise ValueError("give a 'rating', a 'correction', or both")
        if self.correction is not None and not self.correction.strip():
            raise ValueError("the 'correction' is empty; write the answer as it should have been")
        return self

    @property
    def rating_value(self) -> Rating | None:
        """The rating as a word."""
        return None if self.rating is None else _RATINGS[self.rating]


class FeedbackListQuery(ListQuery):
    """The query of the list of feedback."""

    adapter: str | None = Field(default=None, description="Adapter that answered, as `tenant/adapter`.")
    user: str | None = Field(default=None, description="User of the completions.")
    texts: bool = Field(default=False, description="Include the request and the answer of each completion.")


class UserQuery(BaseModel):
    """The query of the deletion of a user's data."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    user: str = Field(min_length=1, description="The `user` of the requests.")


_StoredMetadata = Annotated[dict[str, str], Field(description="Metadata of the request, or as it was changed since.")]
_StoredUser = Annotated[str | None, Field(description="The `user` of the request.")]


@response_object
class StoredChatCompletion(ChatCompletion):
    """A stored chat completion. Log probabilities are not stored."""

    metadata: _StoredMetadata
    user: _StoredUser


@response_object
class StoredCompletion(Completion):
    """A stored text completion. Log probabilities are not stored."""

    metadata: _StoredMetadata
    user: _StoredUser


@response_object
class StoredMessage(TypedDict):
    """A message of a stored chat completion's request."""

    id: Annotated[str, Field(description="ID of the message.")]
    role: Annotated[str, Field(description="Role of the author.")]
    content: Annotated[str | None, Field(description="Text of the message.")]
    name: NotRequired[Annotated[str, Field(description="Author among those of one role.")]]
    tool_calls: NotRequired[Annotated[list[dict[str, Any]], Field(description="Tool calls of the assistant.")]]
    tool_call_id: NotRequired[Annotated[str, Field(description="Call that the message answers.")]]


@response_object
class DeletedChatCompletion(TypedDict):
    """A deleted chat completion."""

    id: Annotated[str, Field(description="ID of the completion.")]
    object: ObjectType[Literal["chat.completion.deleted"]]
    deleted: Deleted
    files: Annotated[list[str], Field(description="Files of nightly runs that have examples of it, and stay.")]


@response_object
class DeletedCompletion(TypedDict):
    """A deleted text completion."""

    id: Annotated[str, Field(description="ID of the completion.")]
    object: ObjectType[Literal["text_completion.deleted"]]
    deleted: Deleted
    files: Annotated[list[str], Field(description="Files of nightly runs that have examples of it, and stay.")]


class FeedbackTexts(BaseModel):
    """What a rated answer was about."""

    model_config = ALL_FIELDS

    messages: list[dict[str, Any]] | None = Field(description="Messages of a chat completion's request.")
    tools: list[dict[str, Any]] | None = Field(description="Tools of a chat completion's request.")
    prompt: str | list[int] | None = Field(description="Prompt of a text completion, as text or as token ids.")
    answer: AssistantMessage | str = Field(description="The answer: a message, or the text of a text completion.")


class Feedback(FeedbackRecord):
    """The rating and the correction of an answer."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["feedback"]]
    texts: FeedbackTexts | None = Field(default=None, description="The request and the answer, if requested.")


class FeedbackDeleted(CompletionDeletion):
    """Deleted feedback."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["feedback.deleted"]]
    deleted: Deleted
