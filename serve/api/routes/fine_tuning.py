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
from loramill.serve.api.dependencies import Gateway, Here, Who
from loramill.serve.api.routes.audit import note
from loramill.serve.api.schemas.common import Page, Paging, page_of
from loramill.serve.api.schemas.jobs import EVENT_ID, NewJob, checkpoint_object, event_number, event_object, job_object
from loramill.serve.api.submission import check, queue
from loramill.types import JobRecord

router = APIRouter(tags=["jobs"])

PATH = "/v1/fine_tuning/jobs"

_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
#: Metadata that jobs can be looked up by: SQLite's paths into JSON can name no others.
_KEY = r"^[ !#-\[\]-~]*$"


class JobPaging(Paging):
    """The query of the list of jobs: OpenAI's, with `metadata[key]=value` read into one mapping."""

    metadata: dict[Annotated[str, StringConstraints(pattern=_KEY)], str] = Field(
        default={}, json_schema_extra={"additionalProperties": False}
    )


class EventPaging(Paging):
    """The query of a job's events."""

    after: Annotated[str, StringConstraints(pattern=EVENT_ID)] | None = None


async def _job_paging(request: Request) -> JobPaging:
    said: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, value in request.query_params.items():
        found = _METADATA.fullmatch(name)
        if found is None:
            said[name] = value
        elif not re.fullmatch(_KEY, found[1]):
            raise InvalidRequest(
                "Jobs can be looked up by metadata whose key is printable ASCII without quotes.", param=name
            )
        else:
            metadata[found[1]] = value
    try:
        return JobPaging.model_validate(said | ({"metadata": metadata} if metadata else {}))
    except ValidationError as error:
        problems = [{**problem, "loc": ("query", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


@router.post(PATH)
def create_job(body: NewJob, here: Here, who: Who) -> dict[str, Any]:
    """Freezes a job's spec, checks its data against it, sizes it for one GPU, and queues it."""
    tenant = who.acting()
    with here.registry.reading() as session:
        checked = check(session, body, here, tenant)
    with here.registry.writing() as session:
        return job_object(queue(session, checked, who), here.base, checked.examples)


#: FastAPI can't see what a function reads of the query by itself.
_QUERY = {
    "parameters": [
        {"name": name, "in": "query", "schema": schema} | ({"style": "deepObject"} if name == "metadata" else {})
        for name, schema in JobPaging.model_json_schema()["properties"].items()
    ]
}


@router.get(PATH, openapi_extra=_QUERY)
def list_jobs(page: Annotated[JobPaging, Depends(_job_paging)], here: Here, who: Who) -> dict[str, Any]:
    """The caller's jobs, newest first; those with all the metadata that is asked for."""
    with here.registry.reading() as session:
        records = jobs.list_of(
            session, tenant=who.tenant, after=page.after, limit=page.limit + 1, metadata=page.metadata
        )
        counts = datasets.counts(session, (job.spec.train for job in records))
    return page_of(records, page.limit, lambda job: job_object(job, here.base, counts.get(job.spec.train)))


@router.get(PATH + "/{job_id}")
def retrieve_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """One job as it is now. Here and below, the first digits of an id are enough if they belong to one job only."""
    with here.registry.reading() as session:
        return _shown(here, session, jobs.get(session, job_id, who.tenant))


@router.post(PATH + "/{job_id}/cancel")
def cancel_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Asks a job to stop; it publishes nothing from then on."""
    return _changed(job_id, here, who, "cancel", jobs.cancel)


@router.post(PATH + "/{job_id}/pause")
def pause_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Asks a job to wait; it goes on where it was once it is resumed."""
    return _changed(job_id, here, who, "pause", jobs.pause)


@router.post(PATH + "/{job_id}/resume")
def resume_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Lets a paused job go on."""
    return _changed(job_id, here, who, "resume", jobs.resume)


@router.post(PATH + "/{job_id}/retry")
def retry_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Queues a failed or cancelled job again; it resumes from its last checkpoint if that still exists."""
    return _changed(job_id, here, who, "retry", jobs.retry)


@router.get(PATH + "/{job_id}/events")
def list_events(job_id: str, page: Annotated[EventPaging, Query()], here: Here, who: Who) -> dict[str, Any]:
    """A job's history, newest first."""
    before = event_number(page.after) if page.after else None
    with here.registry.reading() as session:
        job = jobs.get(session, job_id, who.tenant)
        events = history.newest(session, job.id, before=before, limit=page.limit + 1)
    return page_of(events, page.limit, event_object)


@router.get(PATH + "/{job_id}/checkpoints")
def list_checkpoints(job_id: str, page: Page, here: Here, who: Who) -> dict[str, Any]:
    """Where a job's weights were validated, the latest first.

    The weights of a few can be asked (`fine_tuned_model_checkpoint`); that name is empty where they are gone.
    """
    with here.registry.reading() as session:
        job = jobs.get(session, job_id, who.tenant)
        found = checkpoints.list_of(session, job.id, page.after, page.limit + 1)
    return page_of(found, page.limit, lambda checkpoint: checkpoint_object(checkpoint, job))


def _changed(
    job_id: str, here: Gateway, who: Who, verb: str, change: Callable[[Session, str], JobRecord]
) -> dict[str, Any]:
    with here.registry.writing() as session:
        job = change(session, jobs.get(session, job_id, who.tenant).id)
        note(session, who, f"job.{verb}", job.id, job.tenant)
        return _shown(here, session, job)


def _shown(here: Gateway, session: Session, job: JobRecord) -> dict[str, Any]:
    return job_object(job, here.base, datasets.counts(session, [job.spec.train]).get(job.spec.train))
