"""/v1/files: datasets, validated while they are uploaded, and the results of jobs."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from loramill.data.examples import check_tokens, read_examples
from loramill.names import results_id
from loramill.registry import datasets, jobs, tenants
from loramill.registry.jobs import results
from loramill.serve.api.dependencies import Here, Who
from loramill.serve.api.readings import DATA
from loramill.serve.api.routes.audit import note
from loramill.serve.api.routes.preview import preview
from loramill.serve.api.schemas.common import Paging, page_of
from loramill.submission.defaults import MAX_LENGTH
from loramill.types import DatasetRecord, JobRecord, Learn

router = APIRouter(tags=["data"])

PATH = "/v1/files"


class Upload(BaseModel):
    """The form of an upload."""

    model_config = ConfigDict(extra="forbid")
    purpose: Literal["fine-tune"]
    file: UploadFile
    reuse: bool = Field(default=False, description="answer with the tenant's file of this content, if it has one")


class Check(BaseModel):
    """A file to check, and the options of a job that would train on it."""

    model_config = ConfigDict(extra="forbid")
    file: UploadFile
    use: Literal["training", "validation"] = "training"
    max_length: int | None = Field(default=None, ge=8, description="tokens of the longest example")
    learn: Learn = Field(default="all", description="which answers of a conversation are trained")


class FilePaging(Paging):
    """The query of the list of files."""

    limit: int = Field(default=10_000, ge=1, le=10_000)
    purpose: Literal["fine-tune"] = "fine-tune"
    order: Literal["desc"] = "desc"


@router.post(PATH)
def create_file(
    form: Annotated[Upload, Form(media_type="multipart/form-data")], here: Here, who: Who
) -> dict[str, Any]:
    """Validates examples and keeps them. Every problem is in the error's message, one a line."""
    tenant = who.acting()
    filename, raw = PurePath(form.file.filename or "upload.jsonl").name, form.file.file.read()
    with here.registry.reading() as session:
        tenants.check_room(session, tenant, len(raw))
    examples = read_examples(raw, filename)
    # A job may say a smaller limit, and is checked against it; what is longer than the context can never be trained on.
    check_tokens(examples, here.tokenizer, here.base.context_length)
    artifact = here.registry.artifacts.put({DATA: raw})
    with here.registry.writing() as session:
        record = datasets.find(session, tenant, artifact) if form.reuse else None
        reused = record is not None
        if record is None:
            tenants.check_room(session, tenant, len(raw), hold=True)
            record = datasets.create(session, tenant, filename, artifact, len(raw), len(examples.examples))
            note(session, who, "file.create", record.id, tenant, bytes=record.bytes)
    shown = _file(record) | {"status_details": "\n".join(examples.warnings) or None}
    return shown | ({"loramill": {**shown["loramill"], "reused": True}} if reused else {})


@router.post(PATH + "/check")
def check_file(form: Annotated[Check, Form(media_type="multipart/form-data")], here: Here, who: Who) -> dict[str, Any]:
    """Validates examples as an upload and a job would, and describes what would be trained; nothing is stored."""
    who.acting()
    filename, raw = PurePath(form.file.filename or "upload.jsonl").name, form.file.file.read()
    minimum = here.settings.jobs.min_examples if form.use == "training" else 1
    examples = read_examples(raw, filename, minimum=minimum)
    longest = min(form.max_length or MAX_LENGTH, here.base.context_length)
    check_tokens(examples, here.tokenizer, longest, form.learn)
    return {
        "object": "file.check",
        "filename": filename,
        "bytes": len(raw),
        "examples": len(examples.examples),
        "status_details": "\n".join(examples.warnings) or None,
        **preview(examples, here.tokenizer, form.learn),
    }


@router.get(PATH)
def list_files(page: Annotated[FilePaging, Query()], here: Here, who: Who) -> dict[str, Any]:
    """The caller's files, newest first."""
    with here.registry.reading() as session:
        records = datasets.list_of(session, who.tenant, page.after, page.limit + 1)
    return page_of(records, page.limit, _file)


@router.get(PATH + "/{file_id}")
def retrieve_file(file_id: str, here: Here, who: Who) -> dict[str, Any]:
    """One file's description."""
    with here.registry.reading() as session:
        if (job_id := results.job_of(file_id)) is not None:
            return _results(jobs.get(session, job_id, who.tenant), results.write(session, job_id))
        return _file(datasets.get(session, file_id, who.tenant))


@router.get(PATH + "/{file_id}/content")
def retrieve_content(file_id: str, here: Here, who: Who) -> Response:
    """One file's bytes, as they were uploaded; or a job's metrics, at any time, as a CSV."""
    with here.registry.reading() as session:
        if (job_id := results.job_of(file_id)) is not None:
            jobs.get(session, job_id, who.tenant)
            return Response(results.write(session, job_id), media_type="text/csv")
        record = datasets.get(session, file_id, who.tenant)
    return Response(here.registry.artifacts.read(record.artifact, DATA), media_type="application/octet-stream")


@router.delete(PATH + "/{file_id}")
def delete_file(file_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Forgets a file that nothing needs any more."""
    with here.registry.writing() as session:
        owner = datasets.get(session, file_id, who.tenant).tenant
        datasets.delete(session, file_id, who.tenant)
        note(session, who, "file.delete", file_id, owner)
    return {"id": file_id, "object": "file", "deleted": True}


def _file(record: DatasetRecord) -> dict[str, Any]:
    shown = _object(record.id, record.bytes, record.created_at, record.filename, "fine-tune")
    return shown | {"loramill": {"tenant": record.tenant, "examples": record.examples}}


def _results(job: JobRecord, content: bytes) -> dict[str, Any]:
    made = job.finished_at or job.created_at
    return _object(results_id(job.id), len(content), made, results.FILENAME, "fine-tune-results")


def _object(file_id: str, size: int, created_at: float, filename: str, purpose: str) -> dict[str, Any]:
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": int(created_at),
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }
