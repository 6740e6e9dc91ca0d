"""/v1/fine_tuning/jobs: submitting and following fine-tune jobs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, StringConstraints, ValidationError
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest
from loramill.registry import datasets, jobs
from loramill.registry.jobs import checkpoints, history
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import ListQuery, ListQueryParam, page_object
from loramill.serve.api.schemas.jobs import (
    EVENT_ID_PATTERN,
    NewJob,
    checkpoint_object,
    event_number,
    event_object,
    job_object,
)
from loramill.submission.submit import check_request, queue
from loramill.types import JobRecord

router = APIRouter(tags=["jobs"])

JOBS_PATH = "/v1/fine_tuning/jobs"

_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
#: Metadata that jobs can be looked up by: SQLite's paths into JSON can name no others.
_METADATA_KEY = r"^[ !#-\[\]-~]*$"


class JobListQuery(ListQuery):
    """The query of the list of jobs: OpenAI's, with `metadata[key]=value` read into one mapping."""

    metadata: dict[Annotated[str, StringConstraints(pattern=_METADATA_KEY)], str] = Field(
        default={}, json_schema_extra={"additionalProperties": False}
    )


class EventListQuery(ListQuery):
    """The query of a job's events."""

    after: Annotated[str, StringConstraints(pattern=EVENT_ID_PATTERN)] | None = None


async def _job_list_query(request: Request) -> JobListQuery:
    said: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, value in request.query_params.items():
        found = _METADATA.fullmatch(name)
        if found is None:
            said[name] = value
        elif not re.fullmatch(_METADATA_KEY, found[1]):
            raise InvalidRequest(
                "Jobs can be looked up by metadata whose key is printable ASCII without quotes.", param=name
            )
        else:
            metadata[found[1]] = value
    try:
        return JobListQuery.model_validate(said | ({"metadata": metadata} if metadata else {}))
    except ValidationError as error:
        problems = [{**problem, "loc": ("query", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


@router.post(JOBS_PATH)
def create_job(body: NewJob, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Freezes a job's spec, checks its data against it, sizes it for one GPU, and queues it."""
    request = body.to_request(caller.require_tenant())
    with gateway.registry.reading() as session:
        checked = check_request(session, request, gateway.submission)
    with gateway.registry.writing() as session:
        return job_object(queue(session, checked, caller.submitter), gateway.base, checked.examples)


#: FastAPI can't see what a function reads of the query by itself.
_LIST_PARAMETERS = {
    "parameters": [
        {"name": name, "in": "query", "schema": schema} | ({"style": "deepObject"} if name == "metadata" else {})
        for name, schema in JobListQuery.model_json_schema()["properties"].items()
    ]
}


@router.get(JOBS_PATH, openapi_extra=_LIST_PARAMETERS)
def list_jobs(
    query: Annotated[JobListQuery, Depends(_job_list_query)], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """The caller's jobs, newest first; those with all the metadata that is asked for."""
    with gateway.registry.reading() as session:
        records = jobs.list_jobs(
            session, tenant=caller.tenant, after=query.after, limit=query.limit + 1, metadata=query.metadata
        )
        counts = datasets.example_counts(session, (job.spec.train for job in records))
    return page_object(records, query.limit, lambda job: job_object(job, gateway.base, counts.get(job.spec.train)))


@router.get(JOBS_PATH + "/{job_id}")
def retrieve_job(job_id: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """One job as it is now. Here and below, the first digits of an id are enough if they belong to one job only."""
    with gateway.registry.reading() as session:
        return _job_response(gateway, session, jobs.get(session, job_id, caller.tenant))


@router.post(JOBS_PATH + "/{job_id}/cancel")
def cancel_job(job_id: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Asks a job to stop; it publishes nothing from then on."""
    return _change_state(job_id, gateway, caller, "cancel", jobs.cancel)


@router.post(JOBS_PATH + "/{job_id}/pause")
def pause_job(job_id: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Asks a job to wait; it goes on where it was once it is resumed."""
    return _change_state(job_id, gateway, caller, "pause", jobs.pause)


@router.post(JOBS_PATH + "/{job_id}/resume")
def resume_job(job_id: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lets a paused job go on."""
    return _change_state(job_id, gateway, caller, "resume", jobs.resume)


@router.post(JOBS_PATH + "/{job_id}/retry")
def retry_job(job_id: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Queues a failed or cancelled job again; it resumes from its last checkpoint if that still exists."""
    return _change_state(job_id, gateway, caller, "retry", jobs.retry)


@router.get(JOBS_PATH + "/{job_id}/events")
def list_events(
    job_id: str, query: Annotated[EventListQuery, Query()], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """A job's history, newest first."""
    before = event_number(query.after) if query.after else None
    with gateway.registry.reading() as session:
        job = jobs.get(session, job_id, caller.tenant)
        events = history.newest_events(session, job.id, before=before, limit=query.limit + 1)
    return page_object(events, query.limit, event_object)


@router.get(JOBS_PATH + "/{job_id}/checkpoints")
def list_checkpoints(job_id: str, query: ListQueryParam, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Where a job's weights were validated, the latest first.

    The weights of a few can be asked (`fine_tuned_model_checkpoint`); that name is empty where they are gone.
    """
    with gateway.registry.reading() as session:
        job = jobs.get(session, job_id, caller.tenant)
        found = checkpoints.list_checkpoints(session, job.id, query.after, query.limit + 1)
    return page_object(found, query.limit, lambda checkpoint: checkpoint_object(checkpoint, job))


def _change_state(
    job_id: str, gateway: Gateway, caller: CallerDep, verb: str, change: Callable[[Session, str], JobRecord]
) -> dict[str, Any]:
    with gateway.registry.writing() as session:
        job = change(session, jobs.get(session, job_id, caller.tenant).id)
        record_change(session, caller, f"job.{verb}", job.id, job.tenant)
        return _job_response(gateway, session, job)


def _job_response(gateway: Gateway, session: Session, job: JobRecord) -> dict[str, Any]:
    return job_object(job, gateway.base, datasets.example_counts(session, [job.spec.train]).get(job.spec.train))
