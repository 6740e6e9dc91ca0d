"""From a request for a job to a queued one: its spec is frozen, sized and checked against its data before that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy.orm import Session

from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.names import AdapterName, check_name
from loramill.registry import adapters, jobs
from loramill.serve.api.dependencies import Gateway
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes import audit
from loramill.serve.api.routes.references import find_file, named_by
from loramill.serve.api.schemas.jobs import NewJob
from loramill.sizing import check_targets, fit_spec
from loramill.submission.defaults import count_training_tokens, resolve_spec
from loramill.types import DatasetRecord, Executor, JobRecord, JobSpec

Level = Literal["info", "warn"]


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A job that can be queued as it is.

    Attributes:
        examples: of its training file.
        cost: tokens that it will train on.
        notes: what its history begins with, each with its level.
    """

    body: NewJob
    spec: JobSpec
    examples: int
    cost: float
    executor: Executor
    notes: tuple[tuple[Level, str], ...]


def check(session: Session, body: NewJob, gateway: Gateway, tenant: str) -> CheckedJob:
    """Does everything that can be done before a job is queued; changes nothing.

    Raises:
        InvalidRequest: a parameter, which the error names, or the data; DoesNotFit where no GPU of the pool holds it.
    """
    spec, train, valid = _spec(session, body, gateway, tenant)
    check_targets(spec, gateway.base)
    if train.examples < gateway.settings.jobs.min_examples:
        raise DatasetInvalid(
            f"{train.filename} has {train.examples} examples and training takes at least "
            f"{gateway.settings.jobs.min_examples}; add some.",
            param="training_file",
        )
    lengths = gateway.dataset_checks.lengths(train, spec.max_length, spec.train_on)
    warnings: tuple[str, ...] = ()
    held_out: Sequence[int] = ()
    if valid:
        held_out = gateway.dataset_checks.lengths(valid, spec.max_length, spec.train_on)
        warnings = gateway.dataset_checks.warnings(train, valid)
    spec, sized = fit_spec(spec, gateway.base, (*lengths, *held_out), gateway.settings.jobs)
    cost = count_training_tokens(spec, lengths, train.examples)
    notes: list[tuple[Level, str]] = [("info", sized)] if sized else []
    notes += [("warn", warning) for warning in warnings]
    return CheckedJob(body, spec, train.examples, cost, _executor(body, spec, cost, gateway), tuple(notes))


def queue(session: Session, checked: CheckedJob, caller: Caller) -> JobRecord:
    """Queues a job for its tenant, on behalf of who asked for it.

    Raises:
        QuotaExceeded: its tenant has as many waiting as it may.
        NotFound: a file or version was deleted since it was checked.
    """
    job = jobs.submit(
        session,
        checked.spec,
        checked.body.metadata,
        priority=checked.body.loramill.priority,
        executor=checked.executor,
        cost=checked.cost,
    )
    for level, note in checked.notes:
        jobs.add_event(session, job.id, level, "message", note, {})
    audit.record_change(session, caller, "job.create", job.id, job.tenant, adapter=job.spec.adapter)
    return job


def _spec(
    session: Session, body: NewJob, here: Gateway, tenant: str
) -> tuple[JobSpec, DatasetRecord, DatasetRecord | None]:
    """The spec with every "auto" filled in, and the files it names."""
    if body.model != here.base.name:
        raise InvalidRequest(
            f"'{body.model}' can't be tuned here; 'model' is '{here.base.name}', and to go on from an "
            "adapter's version, 'loramill.start_from' names that.",
            param="model",
        )
    asked = body.hyperparameters_or_default()
    with named_by("suffix"):
        name = AdapterName(tenant, check_name(body.suffix, "adapter"))
    train = find_file(session, body.training_file, tenant, "training_file")
    valid = find_file(session, body.validation_file, tenant, "validation_file") if body.validation_file else None
    spec = resolve_spec(
        base=here.base.fingerprint,
        context_length=here.base.context_length,
        adapter=str(name),
        train=train.id,
        examples=train.examples,
        valid=valid.id if valid else None,
        start_from=_start_from(session, here, name, body.loramill.start_from),
        seed=body.seed,
        quantization=here.base.quantization,
        hyperparameters=asked,
        extension=body.loramill,
    )
    return spec, train, valid


def _start_from(session: Session, here: Gateway, name: AdapterName, selector: str | None) -> str | None:
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
    if version.base != here.base.fingerprint:
        raise InvalidRequest(
            f"{name.at(version.id)} was trained on another base than '{here.base.name}'; start fresh.",
            param="loramill.start_from",
        )
    return version.id


def _executor(body: NewJob, spec: JobSpec, cost: float, here: Gateway) -> Executor:
    """Who runs it: what is long, or doesn't fit a session, gets a trainer of its own."""
    own = "full fine-tuning" if spec.method == "full" else "more than one GPU" if spec.gpus > 1 else None
    said = body.loramill.executor
    if own and said == "session":
        raise InvalidRequest(
            f"A session can't run it, since {own} needs a trainer of its own: leave 'executor' out.",
            param="loramill.executor",
        )
    return said or ("dedicated" if own or cost >= here.settings.jobs.dedicated_tokens else "session")
