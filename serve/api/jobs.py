"""/v1/fine_tuning/jobs: submitting and following fine-tune jobs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from loramill.dataset import Examples, check_tokens, compare_splits, read_examples
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.names import AdapterName, check_name
from loramill.recipe import resolve_spec
from loramill.registry import adapters, datasets, jobs
from loramill.serve.api.files import DATA
from loramill.serve.api.gateway import Gateway, Here, Who
from loramill.serve.api.job_wire import NewJob, event_number, event_object, job_object
from loramill.serve.api.references import find_file, named_by
from loramill.serve.api.wire import Page, page_of
from loramill.types import DatasetRecord, JobRecord, JobSpec

router = APIRouter(tags=["jobs"])

PATH = "/v1/fine_tuning/jobs"

#: Events of a job that are looked through; a job has at most so many steps.
MAX_EVENTS = 1_000_000


@router.post(PATH)
def create_job(body: NewJob, here: Here, who: Who) -> dict[str, Any]:
    """Freezes a job's spec, checks its data against it, and queues it."""
    tenant = who.acting()
    if body.model != here.base.name:
        raise InvalidRequest(
            f"'{body.model}' can't be tuned here; 'model' is '{here.base.name}', and to go on from an "
            "adapter's version, 'loramill.start_from' names that.",
            param="model",
        )
    spec, train, valid = _spec(body, here, tenant)
    warnings = _check_data(here, spec, train, valid)
    with here.registry.writing() as session:
        job = jobs.submit(session, spec, body.metadata)
        for warning in warnings:
            jobs.add_event(session, job.id, "warn", "message", warning, {})
    return job_object(job, here.base, train.examples)


@router.get(PATH)
def list_jobs(page: Page, here: Here, who: Who) -> dict[str, Any]:
    """The caller's jobs, newest first."""
    with here.registry.reading() as session:
        records = jobs.list_of(session, tenant=who.tenant, after=page.after, limit=page.limit + 1)
        return page_of(records, page.limit, lambda job: _shown(here, session, job))


@router.get(PATH + "/{job_id}")
def retrieve_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """One job as it is now."""
    with here.registry.reading() as session:
        return _shown(here, session, jobs.get(session, job_id, who.tenant))


@router.post(PATH + "/{job_id}/cancel")
def cancel_job(job_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Asks a job to stop; it publishes nothing from then on."""
    with here.registry.writing() as session:
        jobs.get(session, job_id, who.tenant)
        return _shown(here, session, jobs.cancel(session, job_id))


@router.get(PATH + "/{job_id}/events")
def list_events(job_id: str, page: Page, here: Here, who: Who) -> dict[str, Any]:
    """A job's history, newest first."""
    before = event_number(page.after) if page.after else None
    with here.registry.reading() as session:
        jobs.get(session, job_id, who.tenant)
        events = jobs.events(session, job_id, limit=MAX_EVENTS)
    older = [event for event in reversed(events) if before is None or event.id < before]
    return page_of(older[: page.limit + 1], page.limit, event_object)


@router.get(PATH + "/{job_id}/checkpoints")
def list_checkpoints(job_id: str, page: Page, here: Here, who: Who) -> dict[str, Any]:
    """None: checkpoints are a worker's own business, only the finished version is published."""
    with here.registry.reading() as session:
        jobs.get(session, job_id, who.tenant)
    return page_of([], page.limit, event_object)


def _spec(body: NewJob, here: Gateway, tenant: str) -> tuple[JobSpec, DatasetRecord, DatasetRecord | None]:
    """The frozen spec, and the files it names."""
    name = AdapterName(tenant, _suffix(body.suffix))
    with here.registry.reading() as session:
        train = find_file(session, body.training_file, tenant, "training_file")
        valid = find_file(session, body.validation_file, tenant, "validation_file") if body.validation_file else None
        start_from = _start_from(session, here, name, body.loramill.start_from)
    spec = resolve_spec(
        base=here.base.fingerprint,
        context_length=here.base.context_length,
        adapter=str(name),
        train=train.id,
        examples=train.examples,
        valid=valid.id if valid else None,
        start_from=start_from,
        seed=body.seed,
        hyperparameters=body.asked(),
        extension=body.loramill,
    )
    return spec, train, valid


def _suffix(text: str) -> str:
    try:
        return check_name(text, "adapter")
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="suffix") from error


def _start_from(session: Session, here: Gateway, name: AdapterName, selector: str | None) -> str | None:
    if selector is None:
        return None
    with named_by("loramill.start_from"):
        version = adapters.resolve(session, name, selector)
    if version.base != here.base.fingerprint:
        raise InvalidRequest(
            f"{name.at(version.id)} was trained on another base than '{here.base.name}'; start fresh.",
            param="loramill.start_from",
        )
    return version.id


def _check_data(here: Gateway, spec: JobSpec, train: DatasetRecord, valid: DatasetRecord | None) -> tuple[str, ...]:
    """Checks files, each valid by itself, against the spec; returns what is odd about them together."""
    minimum = here.settings.jobs.min_examples
    if train.examples < minimum:
        raise DatasetInvalid(
            f"{train.filename} has {train.examples} examples and training takes at least {minimum}; add some.",
            param="training_file",
        )
    examples = _examples(here, spec, train)
    return compare_splits(examples, _examples(here, spec, valid)) if valid else ()


def _examples(here: Gateway, spec: JobSpec, record: DatasetRecord) -> Examples:
    examples = read_examples(here.registry.artifacts.read(record.artifact, DATA), record.filename)
    check_tokens(examples, here.tokenizer, spec.max_length)
    return examples


def _shown(here: Gateway, session: Session, job: JobRecord) -> dict[str, Any]:
    return job_object(job, here.base, datasets.get(session, job.spec.train).examples)
