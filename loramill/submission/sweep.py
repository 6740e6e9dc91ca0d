"""Sweeps: the candidates of a request, and what they may differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import product
from math import prod
from typing import Any

from pydantic import ValidationError

from loramill.errors import InvalidRequest
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.types import JobSpec

MAX_CANDIDATES = 64
#: Options that candidates may differ in: whatever their values, candidates train on the same data for the same number
#: of steps, and their validation losses are comparable.
SWEEPABLE = (
    "method", "rank", "alpha", "rslora", "dropout", "targets", "layers", "init_rank", "loraplus_lr_ratio",
    "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm",
)  # fmt: skip
_PARAM = "loramill.sweep"


def sweep_from_text(text: str) -> dict[str, list[object]]:
    """Reads "learning-rate=1e-4,3e-4; rank=8,32" as values by option, which are still text.

    Raises:
        InvalidRequest: a part is not NAME=VALUE,VALUE.
    """
    values: dict[str, list[object]] = {}
    for part in filter(None, (each.strip() for each in text.split(";"))):
        name, equals, listed = part.partition("=")
        found = [value.strip() for value in listed.split(",") if value.strip()]
        if not equals or not found:
            raise InvalidRequest(f"sweep is '{part}'; write it as NAME=VALUE,VALUE, such as rank=8,32.", param=_PARAM)
        option = name.strip().replace("-", "_")
        values.setdefault("learning_rate" if option == "lr" else option, []).extend(found)
    return values


def check_sweep(sweep: Mapping[str, Sequence[object]]) -> None:
    """Checks the names of a sweep's options and the number of their values.

    Raises:
        InvalidRequest: an option does not exist or may not differ between candidates, has less than two values or one
            twice, or there are no candidates or too many.
    """
    for name, values in sweep.items():
        if name not in SWEEPABLE:
            near = get_close_matches(name, SWEEPABLE, n=1)
            raise _refusal(
                f"'{name}' can't differ between the candidates of a sweep, which are compared on the same data, after "
                "the same number of steps, by the same loss"
                + (f"; did you mean '{near[0]}'?" if near else f": sweep any of {', '.join(SWEEPABLE)}.")
            )
        if len(values) < 2:
            raise _refusal(f"'{name}' has {len(values) or 'no'} value: give at least two, or set the option instead.")
    count = prod(map(len, sweep.values()))
    if not sweep or count > MAX_CANDIDATES:
        raise _refusal(
            f"The sweep has {count if sweep else 'no'} candidates, one per combination of values; it may have 2 to "
            f"{MAX_CANDIDATES}."
        )
    for name, values in sweep.items():
        for index, value in enumerate(values):
            if value in values[:index]:
                raise _refusal(f"'{name}' has the value {value} twice: remove one.")


def check_validation_file(valid: str | None) -> None:
    """Checks that a sweep has a validation file.

    Raises:
        InvalidRequest: it has none.
    """
    if valid is None:
        raise InvalidRequest(
            "A sweep compares its candidates by their validation loss: give a validation file.", param="validation_file"
        )


def candidate_requests(request: JobRequest) -> list[JobRequest]:
    """The request of each candidate of a sweep; of another job, the request itself.

    Raises:
        InvalidRequest: as `check_sweep`; or a value is of another type, an option is given besides the sweep, or the
            validation file is missing.
    """
    options = request.options
    if options.sweep is None:
        return [request]
    check_sweep(options.sweep)
    for name in options.sweep:
        if getattr(options, name) is not None:
            raise _refusal(f"'{name}' is given as an option and in the sweep: remove one.")
    check_validation_file(request.valid)
    if options.executor == "dedicated":
        raise InvalidRequest(
            "The candidates of a sweep share a session: leave 'executor' out.", param="loramill.executor"
        )
    checked = {name: [_read(name, value) for value in values] for name, values in options.sweep.items()}
    check_sweep(checked)  # two texts may be the same number
    return [
        replace(request, options=options.model_copy(update={"sweep": None, **dict(zip(checked, values, strict=True))}))
        for values in product(*checked.values())
    ]


def combine(specs: Sequence[JobSpec]) -> JobSpec:
    """The spec of a job that trains these candidates.

    Args:
        specs: of the candidates; a single one is a job without a sweep.

    Raises:
        InvalidRequest: two candidates are the same, or they can't be trained in one session.
    """
    if len(specs) == 1:
        return specs[0]
    rows = [spec.model_dump(mode="json") for spec in specs]
    for second, row in enumerate(rows):
        if (first := rows.index(row)) < second:
            raise _refusal(f"Candidates {first + 1} and {second + 1} of the sweep are the same job: remove one.")
    if any(spec.method == "full" or spec.gpus > 1 for spec in specs):
        what = "several GPUs" if specs[0].gpus > 1 else "full fine-tuning"
        raise _refusal(
            f"The candidates of a sweep share a session, which can't run {what}: use one GPU and a method such as lora."
        )
    differing = [name for name, value in rows[0].items() if any(row[name] != value for row in rows)]
    return specs[0].model_copy(update={"candidates": tuple({name: row[name] for name in differing} for row in rows)})


def _read(name: str, value: object) -> Any:
    try:
        return getattr(LoramillOptions.model_validate({name: value}), name)
    except ValidationError as error:
        raise _refusal(f"'{name}': {error.errors()[0]['msg']}.") from error


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param=_PARAM)
