"""/v1/fine_tuning/jobs/batch: hundreds of jobs in one request. All are submitted, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, LoramillError
from loramill.registry import jobs
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.errors import error_body, invalid_request
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.fine_tuning import JOBS_PATH
from loramill.serve.api.schemas.common import RequestBody
from loramill.serve.api.schemas.job_objects import BatchResult
from loramill.serve.api.schemas.jobs import NewJob, job_object
from loramill.submission.submit import CheckedJob, check_request, queue
from loramill.types import JobRecord, JobStatus

router = APIRouter(tags=["jobs"], responses=ERRORS)

#: The metadata key that identifies a job when its batch is sent again.
BATCH_KEY = "loramill_key"


class JobBatch(RequestBody):
    """Jobs to submit together."""

    jobs: list[dict[str, Any]] = Field(
        min_length=1,
        max_length=500,
        description="Requests for jobs, like the body of a single one, with `tenant` if the key is an admin key. If "
        "the tenant has a job with the same `metadata.loramill_key`, that job is returned instead of a new one.",
    )
    check_only: bool = Field(default=False, description="Only check the jobs.")
    retry: bool = Field(default=False, description="Submit again those jobs that failed or were cancelled.")


@dataclass(frozen=True, slots=True)
class _BatchItem:
    """One job of a batch: an error, a checked job, or a job that was submitted before."""

    checked: CheckedJob | None = None
    existing: JobRecord | None = None
    error: LoramillError | None = None


@router.post(JOBS_PATH + "/batch", summary="Create many jobs", responses=returns(BatchResult))
def create_batch(body: JobBatch, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Checks all jobs, then submits them in one transaction. If any of them has an error, none is submitted."""
    with gateway.registry.reading() as session:
        existing = _existing_jobs(session, body)
        entries = [_check_item(session, job, existing, gateway, caller) for job in body.jobs]
    if body.check_only or any(entry.error for entry in entries):
        return _batch_object([_item_object(gateway, entry) for entry in entries], submitted=False)
    with gateway.registry.writing() as session:
        queued = [_queue_item(session, entry, gateway, caller) for entry in entries]
        if any(entry["error"] for entry in queued):
            session.rollback()
            return _batch_object([{**entry, "job": None, "new": False} for entry in queued], submitted=False)
    return _batch_object(queued, submitted=True)


def _existing_jobs(session: Session, body: JobBatch) -> dict[tuple[str, str], JobRecord]:
    """The jobs of this batch that were submitted before, by tenant and key."""
    keys = {metadata.get(BATCH_KEY) for job in body.jobs if isinstance(metadata := job.get("metadata"), Mapping)}
    found = jobs.list_by_metadata(session, BATCH_KEY, [key for key in keys if isinstance(key, str)])
    again = (JobStatus.FAILED, JobStatus.CANCELLED) if body.retry else ()
    return {(job.tenant, job.metadata[BATCH_KEY]): job for job in found if job.status not in again}


def _check_item(
    session: Session,
    fields: Mapping[str, Any],
    existing: Mapping[tuple[str, str], JobRecord],
    gateway: Gateway,
    caller: Caller,
) -> _BatchItem:
    try:
        tenant = _tenant(fields.get("tenant"), caller)
        job = _parse_job({name: value for name, value in fields.items() if name != "tenant"})
        before = existing.get((tenant, job.metadata.get(BATCH_KEY, "")))
        if before:
            return _BatchItem(existing=before)
        return _BatchItem(checked=check_request(session, job.to_request(tenant), gateway.submission))
    except LoramillError as error:
        return _BatchItem(error=error)


def _tenant(tenant: object, caller: Caller) -> str:
    if tenant is None:
        return caller.require_tenant()
    if not isinstance(tenant, str):
        raise InvalidRequest("'tenant' must be a string.", param="tenant")
    caller.check_adapter(tenant)
    return tenant


def _parse_job(fields: Mapping[str, Any]) -> NewJob:
    try:
        return NewJob.model_validate(fields)
    except ValidationError as error:
        raise invalid_request([{**each, "loc": ("body", *each["loc"])} for each in error.errors()], fields) from error


def _queue_item(session: Session, item: _BatchItem, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    if item.checked is None:
        return _item_object(gateway, item)
    try:
        job = queue(session, item.checked, caller.submitter)
    except LoramillError as error:
        return {"job": None, "new": False, **error_body(error)}
    return {"job": job_object(job, gateway.base, item.checked.examples), "new": True, "error": None}


def _item_object(gateway: Gateway, item: _BatchItem) -> dict[str, Any]:
    error = error_body(item.error) if item.error else {"error": None}
    return {"job": job_object(item.existing, gateway.base, None) if item.existing else None, "new": False, **error}


def _batch_object(data: list[dict[str, Any]], *, submitted: bool) -> dict[str, Any]:
    return {"object": "fine_tuning.batch", "submitted": submitted, "data": data}
