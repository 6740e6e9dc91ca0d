"""Submission: the one path from a request for a job to a job in the queue.

A job is checked (its targets against the base, its data against the spec), sized and priced, and an executor is chosen,
before it is queued; the queue entry and the audit entry are written in one transaction. The API, the CLI (through the
API) and the nightly pipeline submit jobs in this way.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy.orm import Session

from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import adapters, audit, datasets, jobs, pool_gpus
from loramill.settings import JobSettings
from loramill.sizing import check_targets, fit_spec
from loramill.submission.dataset_checks import DatasetChecks
from loramill.submission.defaults import count_training_tokens, resolve_spec
from loramill.submission.objectives import check_kind
from loramill.submission.references import find_file, named_by
from loramill.submission.request import JobRequest
from loramill.submission.sweep import candidate_requests, combine
from loramill.types import Executor, JobRecord, JobSpec, VersionRecord


@dataclass(frozen=True, slots=True)
class SubmissionContext:
    """The base that jobs train, the settings of the pool, and the checks of data."""

    base: Base
    settings: JobSettings
    checks: DatasetChecks


@dataclass(frozen=True, slots=True)
class Submitter:
    """The author of a job, for the audit.

    Attributes:
        tenant: the tenant of the API key; None: an admin, or the nightly pipeline.
        key_id: id of the API key, or "nightly".
        request_id: id of the request, or of the nightly run.
    """

    tenant: str | None
    key_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A job that can be queued.

    Attributes:
        spec: with every default chosen, and sized.
        examples: number of examples in the training file.
        cost: tokens that the job trains on, prompts included.
        notes: the first events of the job, each with its level.
    """

    spec: JobSpec
    examples: int
    cost: float
    executor: Executor
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[tuple[Literal["info", "warn"], str], ...] = ()


def check_request(session: Session, request: JobRequest, context: SubmissionContext) -> CheckedJob:
    """Chooses the defaults of a request and checks the job; changes nothing.

    Raises:
        InvalidRequest: a parameter is wrong (`param` names it), or the data; DoesNotFit if no GPU of the pool can hold
            the job.
    """
    base = context.base
    if request.base not in (None, base.name):
        raise InvalidRequest(
            f"'{request.base}' can't be fine-tuned here; 'model' must be '{base.name}'. To continue from a version of "
            "an adapter, set 'loramill.start_from'.",
            param="model",
        )
    tenant = request.adapter.tenant
    train = find_file(session, request.train, tenant, "training_file")
    if request.valid:
        find_file(session, request.valid, tenant, "validation_file")
    start = _find_start(session, base, request.adapter, request.options.start_from)
    start_id = start.id if start else None
    continued = jobs.get(session, start.job).spec if start and start.job else None
    candidates = candidate_requests(request)
    spec = combine([resolve_spec(each, base, train.examples, start_id, continued) for each in candidates])
    return check_spec(
        session,
        spec,
        context,
        executor=request.options.executor,
        priority=request.options.priority,
        metadata=request.metadata,
    )


def check_spec(
    session: Session,
    spec: JobSpec,
    context: SubmissionContext,
    *,
    adjustable: Collection[str] | None = None,
    executor: Executor | None = None,
    priority: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> CheckedJob:
    """Checks, sizes and prices a job whose defaults are chosen; changes nothing.

    Args:
        adjustable: fields of `loramill.sizing.ADJUSTABLE` that sizing may change; None: those with which the spec was
            not made.
        executor: None: chosen.

    Raises:
        NotFound: a dataset was deleted.
        InvalidRequest: as `check_request`.
    """
    for each in spec.trained_specs:
        check_targets(each, context.base)
    tenant, minimum = spec.adapter_name.tenant, context.settings.min_examples
    train = datasets.get(session, spec.train, tenant)
    if train.examples < minimum:
        raise DatasetInvalid(
            f"{train.filename} has {train.examples} examples and training needs at least {minimum}; add some.",
            param="training_file",
        )
    check_kind(spec.objective, context.checks.kind(train), train.filename, "training_file")
    lengths = context.checks.lengths(train, spec.max_length, spec.train_on)
    warnings: tuple[str, ...] = ()
    valid_lengths: Sequence[int] = ()
    if spec.valid:
        valid = datasets.get(session, spec.valid, tenant)
        check_kind(spec.objective, context.checks.kind(valid), valid.filename, "validation_file")
        valid_lengths = context.checks.lengths(valid, spec.max_length, spec.train_on)
        warnings = context.checks.warnings(train, valid)
    pool = _with_known_gpu(session, context.settings)
    spec, explanation = fit_spec(spec, context.base, (*lengths, *valid_lengths), pool, adjustable)
    cost = count_training_tokens(spec, lengths, train.examples)
    notes: list[tuple[Literal["info", "warn"], str]] = [("info", explanation)] if explanation else []
    notes += [("warn", warning) for warning in warnings]
    return CheckedJob(
        spec=spec,
        examples=train.examples,
        cost=cost,
        executor=_choose_executor(spec, cost, context.settings, executor),
        priority=priority,
        metadata=metadata or {},
        notes=tuple(notes),
    )


def _with_known_gpu(session: Session, settings: JobSettings) -> JobSettings:
    """The settings with the memory of the smallest GPU that sessions have reported, unless they have a device's."""
    if not settings.on_gpu or settings.device_bytes is not None:
        return settings
    gpu = pool_gpus.smallest(session, now=time.time())
    return settings if gpu is None else settings.model_copy(update={"device_bytes": gpu.bytes})


def queue(session: Session, job: CheckedJob, submitter: Submitter) -> JobRecord:
    """Queues a checked job for its tenant, with its first events and its audit entry.

    Raises:
        QuotaExceeded: the tenant has as many jobs waiting as it may have.
        NotFound: a file or version was deleted since the job was checked.
    """
    record = jobs.submit(session, job.spec, job.metadata, priority=job.priority, executor=job.executor, cost=job.cost)
    for level, note in job.notes:
        jobs.add_event(session, record.id, note, level=level)
    audit.record(
        session,
        tenant=record.tenant,
        actor=submitter.tenant,
        key=submitter.key_id,
        action="job.create",
        subject=record.id,
        request=submitter.request_id,
        adapter=record.spec.adapter,
    )
    return record


def _find_start(session: Session, base: Base, name: AdapterName, selector: str | None) -> VersionRecord | None:
    """The version that a job continues from; None: it starts from new weights."""
    if selector is None:
        return None
    if "/" in selector or selector.startswith("."):
        raise InvalidRequest(
            f"'start_from' is '{selector}'; it must be an alias or a version of {name}. To start from an adapter in a "
            f"folder, import it first: `loramill adapters import {name} {selector}`.",
            param="loramill.start_from",
        )
    with named_by("loramill.start_from"):
        version = adapters.resolve(session, name, selector)
    if version.base != base.fingerprint:
        raise InvalidRequest(
            f"{name.at(version.id)} was trained on another base than '{base.name}'; leave 'start_from' out.",
            param="loramill.start_from",
        )
    return version


def _choose_executor(spec: JobSpec, cost: float, settings: JobSettings, requested: Executor | None) -> Executor:
    """The requested executor; by default a trainer of its own for a job that is long or that a session can't run."""
    reason = "full fine-tuning" if spec.method == "full" else "more than one GPU" if spec.gpus > 1 else None
    if reason and requested == "session":
        raise InvalidRequest(
            f"A session can't run the job, since {reason} needs a dedicated trainer: leave 'executor' out.",
            param="loramill.executor",
        )
    if spec.candidates:
        return "session"
    return requested or ("dedicated" if reason or cost >= settings.dedicated_tokens else "session")
