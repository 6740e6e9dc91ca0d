"""/v1/fine_tuning/jobs: submitting and following fine-tune jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, StringConstraints
from sqlalchemy.orm import Session

from loramill.registry import datasets, jobs
from loramill.registry.jobs import checkpoints, history
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import JobIdPath, ListObject, ListQuery, ListQueryParam, page_object
from loramill.serve.api.schemas.job_objects import Checkpoint, Job, JobEventObject
from loramill.serve.api.schemas.jobs import (
    EVENT_ID_PATTERN,
    NewJob,
    checkpoint_object,
    event_number,
    event_object,
    job_object,
)
from loramill.serve.api.schemas.metadata_query import MetadataQuery, query_parameters, read_query
from loramill.submission.submit import check_request, queue
from loramill.types import JobRecord

router = APIRouter(tags=["jobs"], responses=ERRORS)

JOBS_PATH = "/v1/fine_tuning/jobs"


class EventListQuery(ListQuery):
    """The query of a job's events."""

    after: Annotated[str, StringConstraints(pattern=EVENT_ID_PATTERN)] | None = Field(
        default=None, description="ID of the last event of the previous page."
    )


async def _job_list_query(request: Request) -> MetadataQuery:
    return read_query(request, MetadataQuery, "Jobs")


@router.post(JOBS_PATH, summary="Create a job", responses=returns(Job))
def create_job(body: NewJob, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Checks a job's options and data, sizes it for a GPU, and queues it with a frozen spec."""
    request = body.to_request(caller.require_tenant())
    with gateway.registry.reading() as session:
        checked = check_request(session, request, gateway.submission)
    with gateway.registry.writing() as session:
        return job_object(queue(session, checked, caller.submitter), gateway.base, checked.examples)


@router.get(
    JOBS_PATH,
    openapi_extra=query_parameters(MetadataQuery),
    summary="List jobs",
    responses=returns(ListObject[Job]),
)
def list_jobs(
    query: Annotated[MetadataQuery, Depends(_job_list_query)], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lists the caller's jobs, newest first. Filters by metadata must all match."""
    with gateway.registry.reading() as session:
        records = jobs.list_jobs(
            session, tenant=caller.tenant, after=query.after, limit=query.limit + 1, metadata=query.metadata
        )
        counts = datasets.example_counts(session, (job.spec.train for job in records))
    return page_object(records, query.limit, lambda job: job_object(job, gateway.base, counts.get(job.spec.train)))


@router.get(JOBS_PATH + "/{job_id}", summary="Retrieve a job", responses=returns(Job))
def retrieve_job(job_id: JobIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Returns a job. Wherever a job's id is needed, its first digits are enough if no other job has them."""
    with gateway.registry.reading() as session:
        return _job_response(gateway, session, jobs.get(session, job_id, caller.tenant))


@router.post(JOBS_PATH + "/{job_id}/cancel", summary="Cancel a job", responses=returns(Job))
def cancel_job(job_id: JobIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Requests a job to stop. It does not publish a version."""
    return _change_state(job_id, gateway, caller, "cancel", jobs.cancel)


@router.post(JOBS_PATH + "/{job_id}/pause", summary="Pause a job", responses=returns(Job))
def pause_job(job_id: JobIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Requests a job to pause. When it is resumed, it continues at the same step."""
    return _change_state(job_id, gateway, caller, "pause", jobs.pause)


@router.post(JOBS_PATH + "/{job_id}/resume", summary="Resume a job", responses=returns(Job))
def resume_job(job_id: JobIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Queues a paused job again."""
    return _change_state(job_id, gateway, caller, "resume", jobs.resume)


@router.post(JOBS_PATH + "/{job_id}/retry", summary="Retry a job", responses=returns(Job))
def retry_job(job_id: JobIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Queues a failed or cancelled job again. It resumes from its last checkpoint if that still exists."""
    return _change_state(job_id, gateway, caller, "retry", jobs.retry)


@router.get(JOBS_PATH + "/{job_id}/events", summary="List events", responses=returns(ListObject[JobEventObject]))
def list_events(
    job_id: JobIdPath, query: Annotated[EventListQuery, Query()], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lists a job's history, newest first."""
    before = event_number(query.after) if query.after else None
    with gateway.registry.reading() as session:
        job = jobs.get(session, job_id, caller.tenant)
        events = history.newest_events(session, job.id, before=before, limit=query.limit + 1)
    return page_object(events, query.limit, event_object)


@router.get(JOBS_PATH + "/{job_id}/checkpoints", summary="List checkpoints", responses=returns(ListObject[Checkpoint]))
def list_checkpoints(
    job_id: JobIdPath, query: ListQueryParam, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lists the steps at which a job's weights were validated, newest first.

    The weights of some are kept and can be used like a version, under `fine_tuned_model_checkpoint`.
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
