"""/v1/fine_tuning/jobs/batch: hundreds of jobs in one request, of which all are submitted or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, LoramillError
from loramill.registry import jobs
from loramill.serve.api.dependencies import Gateway, Here, Who
from loramill.serve.api.errors import error_body, invalid
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.fine_tuning import PATH
from loramill.serve.api.schemas.common import Body
from loramill.serve.api.schemas.jobs import NewJob, job_object
from loramill.serve.api.submission import Checked, check, queue
from loramill.types import JobRecord, JobStatus

router = APIRouter(tags=["jobs"])

#: The metadata by which a job of a batch is known when the batch is sent again.
KEY = "loramill_key"


class Batch(Body):
    """Jobs to submit together.

    Each is the body of a job of its own, with `tenant` for an admin's key. One whose tenant has a job with the same
    `metadata.loramill_key` is submitted already; with `retry`, not if that job failed or was cancelled.
    """

    jobs: list[dict[str, Any]] = Field(min_length=1, max_length=500)
    check_only: bool = False
    retry: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is known of one job of a batch: the error, or what can be queued, or what was queued before."""

    checked: Checked | None = None
    there: JobRecord | None = None
    error: LoramillError | None = None


@router.post(PATH + "/batch")
def create_batch(body: Batch, here: Here, who: Who) -> dict[str, Any]:
    """Checks all jobs, then submits them in one transaction; with an error in any of them, none.

    Each entry of `data` has its `error`, or its `job` (null if there is only a check), and whether that is `new`.
    """
    with here.registry.reading() as session:
        there = _there(session, body)
        entries = [_entry(session, given, there, here, who) for given in body.jobs]
    if body.check_only or any(entry.error for entry in entries):
        return _answer([_shown(here, entry) for entry in entries], submitted=False)
    with here.registry.writing() as session:
        queued = [_queued(session, entry, here, who) for entry in entries]
        if any(entry["error"] for entry in queued):
            session.rollback()
            return _answer([{**entry, "job": None, "new": False} for entry in queued], submitted=False)
    return _answer(queued, submitted=True)


def _there(session: Session, body: Batch) -> dict[tuple[str, str], JobRecord]:
    """The jobs of this batch that were submitted before, by tenant and key."""
    keys = {metadata.get(KEY) for job in body.jobs if isinstance(metadata := job.get("metadata"), Mapping)}
    found = jobs.labelled(session, KEY, [key for key in keys if isinstance(key, str)])
    again = (JobStatus.FAILED, JobStatus.CANCELLED) if body.retry else ()
    return {(job.tenant, job.metadata[KEY]): job for job in found if job.status not in again}


def _entry(
    session: Session, given: Mapping[str, Any], there: Mapping[tuple[str, str], JobRecord], here: Gateway, who: Caller
) -> _Entry:
    try:
        tenant = _tenant(given.get("tenant"), who)
        job = _read({name: value for name, value in given.items() if name != "tenant"})
        before = there.get((tenant, job.metadata.get(KEY, "")))
        return _Entry(there=before) if before else _Entry(checked=check(session, job, here, tenant))
    except LoramillError as error:
        return _Entry(error=error)


def _tenant(said: object, who: Caller) -> str:
    if said is None:
        return who.acting()
    if not isinstance(said, str):
        raise InvalidRequest("'tenant' is no text.", param="tenant")
    who.check_adapter(said)
    return said


def _read(given: Mapping[str, Any]) -> NewJob:
    try:
        return NewJob.model_validate(given)
    except ValidationError as error:
        raise invalid([{**each, "loc": ("body", *each["loc"])} for each in error.errors()], given) from error


def _queued(session: Session, entry: _Entry, here: Gateway, who: Caller) -> dict[str, Any]:
    if entry.checked is None:
        return _shown(here, entry)
    try:
        job = queue(session, entry.checked, who)
    except LoramillError as error:
        return {"job": None, "new": False, **error_body(error)}
    return {"job": job_object(job, here.base, entry.checked.examples), "new": True, "error": None}


def _shown(here: Gateway, entry: _Entry) -> dict[str, Any]:
    error = error_body(entry.error) if entry.error else {"error": None}
    return {"job": job_object(entry.there, here.base, None) if entry.there else None, "new": False, **error}


def _answer(data: list[dict[str, Any]], *, submitted: bool) -> dict[str, Any]:
    return {"object": "fine_tuning.batch", "submitted": submitted, "data": data}
