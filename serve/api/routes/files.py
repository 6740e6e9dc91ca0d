"""/v1/files: dataset files, which are validated on upload, and result files of jobs."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query
from starlette.responses import Response

from loramill.data.encoding import check_tokens
from loramill.data.examples import read_examples
from loramill.data.preview import preview_examples
from loramill.names import results_id
from loramill.registry import datasets, jobs, tenants
from loramill.registry.jobs import results
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.responses import ERRORS, returns, returns_file
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import FileIdPath, ListObject, page_object
from loramill.serve.api.schemas.files import File, FileCheck, FileCheckForm, FileDeleted, FileListQuery, UploadForm
from loramill.submission.dataset_checks import DATA_FILE
from loramill.submission.defaults import MAX_LENGTH
from loramill.submission.request import SPEC_TRAIN_ON
from loramill.types import DatasetRecord, JobRecord

router = APIRouter(tags=["data"], responses=ERRORS)

FILES_PATH = "/v1/files"


@router.post(FILES_PATH, summary="Upload a file", responses=returns(File))
def create_file(
    form: Annotated[UploadForm, Form(media_type="multipart/form-data")], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Validates examples and stores them. The error of an invalid file lists its problems, one per line."""
    tenant = caller.require_tenant()
    filename, raw = PurePath(form.file.filename or "upload.jsonl").name, form.file.file.read()
    with gateway.registry.reading() as session:
        tenants.check_storage_quota(session, tenant, len(raw))
    examples = read_examples(raw, filename)
    # Examples longer than the context can never be trained on. A job's own, smaller limit is checked with the job.
    check_tokens(examples, gateway.tokenizer, gateway.base.context_length)
    artifact = gateway.registry.artifacts.put({DATA_FILE: raw})
    with gateway.registry.writing() as session:
        record = datasets.find(session, tenant, artifact) if form.reuse else None
        reused = record is not None
        if record is None:
            tenants.check_storage_quota(session, tenant, len(raw), lock=True)
            record = datasets.create(session, tenant, filename, artifact, len(raw), len(examples.examples))
            record_change(session, caller, "file.create", record.id, tenant, bytes=record.bytes)
    shown = _file_object(record) | {"status_details": "\n".join(examples.warnings) or None}
    return shown | ({"loramill": {**shown["loramill"], "reused": True}} if reused else {})


@router.post(FILES_PATH + "/check", summary="Check a file", responses=returns(FileCheck))
def check_file(
    form: Annotated[FileCheckForm, Form(media_type="multipart/form-data")], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Validates examples like an upload and a job, and describes what a job would train on. Nothing is stored."""
    caller.require_tenant()
    filename, raw = PurePath(form.file.filename or "upload.jsonl").name, form.file.file.read()
    minimum = gateway.settings.jobs.min_examples if form.use == "training" else 1
    examples = read_examples(raw, filename, minimum=minimum)
    longest = min(form.max_length or MAX_LENGTH, gateway.base.context_length)
    train_on = SPEC_TRAIN_ON[form.train_on]
    check_tokens(examples, gateway.tokenizer, longest, train_on)
    return {
        "object": "file.check",
        "filename": filename,
        "bytes": len(raw),
        "examples": len(examples.examples),
        "status_details": "\n".join(examples.warnings) or None,
        **preview_examples(examples, gateway.tokenizer, train_on),
    }


@router.get(FILES_PATH, summary="List files", responses=returns(ListObject[File]))
def list_files(query: Annotated[FileListQuery, Query()], gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the caller's files, newest first."""
    with gateway.registry.reading() as session:
        records = datasets.list_datasets(session, caller.tenant, query.after, query.limit + 1)
    return page_object(records, query.limit, _file_object)


@router.get(FILES_PATH + "/{file_id}", summary="Retrieve a file", responses=returns(File))
def retrieve_file(file_id: FileIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Returns the description of a file."""
    with gateway.registry.reading() as session:
        if (job_id := results.job_id_of(file_id)) is not None:
            return _results_object(jobs.get(session, job_id, caller.tenant), results.metrics_csv(session, job_id))
        return _file_object(datasets.get(session, file_id, caller.tenant))


@router.get(
    FILES_PATH + "/{file_id}/content",
    summary="Download a file",
    responses=returns_file("application/octet-stream", "text/csv"),
    response_class=Response,
)
def retrieve_content(file_id: FileIdPath, gateway: GatewayDep, caller: CallerDep) -> Response:
    """Returns the bytes of a file as they were uploaded, or the metrics of a job so far as CSV."""
    with gateway.registry.reading() as session:
        if (job_id := results.job_id_of(file_id)) is not None:
            jobs.get(session, job_id, caller.tenant)
            return Response(results.metrics_csv(session, job_id), media_type="text/csv")
        record = datasets.get(session, file_id, caller.tenant)
    return Response(gateway.registry.artifacts.read(record.artifact, DATA_FILE), media_type="application/octet-stream")


@router.delete(FILES_PATH + "/{file_id}", summary="Delete a file", responses=returns(FileDeleted))
def delete_file(file_id: FileIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Deletes a file that neither a job nor a nightly run needs."""
    with gateway.registry.writing() as session:
        owner = datasets.get(session, file_id, caller.tenant).tenant
        datasets.delete(session, file_id, caller.tenant)
        record_change(session, caller, "file.delete", file_id, owner)
    return {"id": file_id, "object": "file", "deleted": True}


def _file_object(record: DatasetRecord) -> dict[str, Any]:
    shown = _openai_file(record.id, record.bytes, record.created_at, record.filename, "fine-tune")
    return shown | {"loramill": {"tenant": record.tenant, "examples": record.examples}}


def _results_object(job: JobRecord, content: bytes) -> dict[str, Any]:
    made = job.finished_at or job.created_at
    return _openai_file(results_id(job.id), len(content), made, results.FILENAME, "fine-tune-results")


def _openai_file(file_id: str, size: int, created_at: float, filename: str, purpose: str) -> dict[str, Any]:
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
