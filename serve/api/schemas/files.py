"""Requests and responses about files."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from loramill.data.preferences import DataKind
from loramill.serve.api.schemas.common import CreatedAt, Deleted, ListQuery, ObjectType, response_object
from loramill.submission.request import TRAIN_ON_DESCRIPTION, RequestedTrainOn


class UploadForm(BaseModel):
    """The form of an upload."""

    model_config = ConfigDict(extra="forbid")
    purpose: Literal["fine-tune"] = Field(description="What the file is for.")
    file: UploadFile = Field(description="JSON lines, with one example per line.")
    reuse: bool = Field(default=False, description="Return the tenant's file with this content, if there is one.")


class FileCheckForm(BaseModel):
    """A file to check, and the options of a job that would train on it."""

    model_config = ConfigDict(extra="forbid")
    file: UploadFile = Field(description="JSON lines, with one example per line.")
    use: Literal["training", "validation"] = Field(default="training", description="What the file is for.")
    max_length: int | None = Field(default=None, ge=8, description="Maximum number of tokens per example.")
    train_on: RequestedTrainOn = Field(default="all", description=TRAIN_ON_DESCRIPTION)


class FileListQuery(ListQuery):
    """The query of the list of files."""

    limit: int = Field(default=10_000, ge=1, le=10_000, description="Maximum number of files.")
    purpose: Literal["fine-tune"] = Field(default="fine-tune", description="What the files are for.")
    order: Literal["desc"] = Field(default="desc", description="Newest first.")


@response_object
class FileExtension(TypedDict):
    """Fields that OpenAI's file object does not have."""

    tenant: Annotated[str, Field(description="Tenant that owns the file.")]
    examples: Annotated[int, Field(description="Number of examples.")]
    reused: NotRequired[Annotated[Literal[True], Field(description="An upload had the content of this file.")]]


@response_object
class File(TypedDict):
    """A dataset, or the results of a job."""

    id: Annotated[str, Field(description="ID of the file.")]
    object: ObjectType[Literal["file"]]
    bytes: Annotated[int, Field(description="Size in bytes.")]
    created_at: CreatedAt
    filename: Annotated[str, Field(description="Name of the file.")]
    purpose: Annotated[Literal["fine-tune", "fine-tune-results"], Field(description="What the file is for.")]
    status: Annotated[Literal["processed"], Field(description="Files are validated while they are uploaded.")]
    status_details: Annotated[str | None, Field(description="After an upload: warnings about the data, one per line.")]
    loramill: NotRequired[Annotated[FileExtension, Field(description="More about a dataset.")]]


@response_object
class FileTokens(TypedDict):
    """Numbers of tokens of a file's sequences. An example may have several sequences."""

    min: Annotated[int, Field(description="Tokens of the shortest sequence.")]
    median: Annotated[int, Field(description="Median.")]
    max: Annotated[int, Field(description="Tokens of the longest sequence.")]
    total: Annotated[int, Field(description="Tokens of all sequences.")]


@response_object
class PreviewPart(TypedDict):
    """A part of an example, as the base's chat template renders it."""

    text: Annotated[str, Field(description="The text.")]
    supervised: Annotated[bool, Field(description="Whether the loss is computed on it.")]


@response_object
class FileCheck(TypedDict):
    """What a job would train on. The file is not stored."""

    object: ObjectType[Literal["file.check"]]
    filename: Annotated[str, Field(description="Name of the file.")]
    bytes: Annotated[int, Field(description="Size in bytes.")]
    examples: Annotated[int, Field(description="Number of examples.")]
    status_details: Annotated[str | None, Field(description="Warnings about the data, one per line.")]
    tokens: Annotated[FileTokens, Field(description="Numbers of tokens.")]
    supervised_tokens: Annotated[int, Field(description="Number of tokens that the loss is computed on.")]
    kind: Annotated[DataKind, Field(description="What the examples teach.")]
    preview: Annotated[
        list[PreviewPart], Field(description="The first example, in parts; a preference once with each answer.")
    ]


@response_object
class FileDeleted(TypedDict):
    """A deleted file."""

    id: Annotated[str, Field(description="ID of the file.")]
    object: ObjectType[Literal["file"]]
    deleted: Deleted
