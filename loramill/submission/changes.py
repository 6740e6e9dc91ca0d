"""Options on top of the spec of another job, as nightly runs use them: what they do not set stays as it is."""

from __future__ import annotations

from typing import Any

from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.submission.defaults import (
    alpha_defaults,
    check_options,
    count_steps,
    method_defaults,
    requested_fields,
    validated_spec,
)
from loramill.submission.options import JobOptions
from loramill.submission.request import Hyperparameters, JobRequest, LoramillOptions
from loramill.submission.sweep import candidate_requests, combine
from loramill.types import JobSpec


def request_of(name: AdapterName, train: str, valid: str | None, options: JobOptions) -> JobRequest:
    """The request of a job with these options."""
    return JobRequest(
        name,
        train,
        valid,
        seed=options.seed or 0,
        metadata=options.metadata or {},
        hyperparameters=Hyperparameters(n_epochs=options.epochs or "auto", batch_size=options.batch_size or "auto"),
        options=LoramillOptions.model_construct(
            **{field: getattr(options, field) for field in LoramillOptions.model_fields}
        ),
    )


def change_spec(spec: JobSpec, options: JobOptions, base: Base, examples: int) -> JobSpec:
    """Changes a spec by the options that are set; steps follow from the number of epochs, unless they are set.

    Args:
        spec: the job.
        options: what changes; a sweep makes it a job of several candidates.
        base: the base of the job.
        examples: number of examples in its training file.

    Raises:
        InvalidRequest: an option is out of its range, or can't be changed for a version that training continues.
    """
    requests = candidate_requests(request_of(spec.adapter_name, spec.train, spec.valid, options))
    return combine([_changed(spec, options, each.options, base, examples) for each in requests])


def _changed(spec: JobSpec, options: JobOptions, candidate: LoramillOptions, base: Base, examples: int) -> JobSpec:
    """The spec of one candidate."""
    check_options(candidate, base)
    requested = requested_fields(candidate)
    chosen: dict[str, Any] = spec.model_dump() | method_defaults(candidate)
    if spec.start_from is None:
        chosen |= alpha_defaults(candidate)
    else:
        _check_continues(spec, requested)
    chosen |= {"seed": spec.seed if options.seed is None else options.seed}
    chosen |= {"batch_size": options.batch_size or spec.batch_size}
    epochs = options.epochs or spec.epochs
    if "steps" in requested:
        chosen["epochs"] = None
    elif epochs is not None:
        chosen |= {"epochs": epochs, "steps": count_steps(epochs, examples, chosen["batch_size"])}
    return validated_spec(chosen, requested)


def _check_continues(spec: JobSpec, requested: dict[str, Any]) -> None:
    """Refuses another rank, alpha or rslora than those of the version that training continues.

    Raises:
        InvalidRequest: one of them differs.
    """
    if requested.get("method", spec.method) in ("adalora", "full"):
        return
    for name in ("rank", "alpha", "rslora"):
        if name in requested and requested[name] != getattr(spec, name):
            raise InvalidRequest(
                f"The option {name} is {requested[name]}, but the champion that training continues has "
                f"{getattr(spec, name)}: leave it out, or start from new weights.",
                param=f"loramill.{name}",
            )
