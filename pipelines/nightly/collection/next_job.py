"""The jobs that a nightly run submits for an adapter."""

from __future__ import annotations

from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.past import Past
from loramill.submission.changes import change_spec, request_of
from loramill.submission.defaults import (
    LEARNING_RATE,
    METHOD_DEFAULTS,
    MIN_STEPS,
    count_steps,
    default_epochs,
    resolve_spec,
)
from loramill.submission.options import JobOptions
from loramill.submission.sweep import candidate_requests, combine
from loramill.types import DatasetRecord, JobSpec

#: Passes over the data of a nightly run that continues from the champion, if these are at least `MIN_STEPS` steps.
EPOCHS = 2
#: What runs use unless nightly.yaml sets options.
NO_OPTIONS = JobOptions()


def starts_of(start: str, past: Past) -> tuple[str, ...]:
    """Where training starts: "champion", "fresh" (new weights), or both in this order."""
    if past.job is None:  # no champion, or one whose job is unknown
        return ("fresh",)
    return ("champion", "fresh") if start == "both" else (start,)


def job_spec(
    name: AdapterName,
    past: Past,
    base: Base,
    options: JobOptions,
    valid: DatasetRecord,
    train: DatasetRecord,
    start: str,
) -> JobSpec:
    """The job of one of the starts."""
    if past.job is None or past.champion is None:
        return first_spec(name, train, valid, base, options)
    if start == "fresh":
        return fresh_spec(past.job, train, valid, base, options)
    return next_spec(past.job, past.champion, train, valid, base, options)


def first_spec(
    name: AdapterName, train: DatasetRecord, valid: DatasetRecord, base: Base, options: JobOptions = NO_OPTIONS
) -> JobSpec:
    """A job with default hyperparameters and these options, for an adapter without a version."""
    requests = candidate_requests(request_of(name, train.id, valid.id, options))
    return combine([resolve_spec(each, base, train.examples) for each in requests])


def next_spec(
    old: JobSpec,
    champion: str,
    train: DatasetRecord,
    valid: DatasetRecord,
    base: Base,
    options: JobOptions = NO_OPTIONS,
) -> JobSpec:
    """The champion's job, continued from its weights at half the learning rate of its first training.

    After preference tuning, the new answers are trained at half the default learning rate.
    """
    # Few examples make few steps per pass; the new ones are then learned at the cost of the old ones.
    batch_size = options.batch_size or old.batch_size
    epochs = max(EPOCHS, -(-MIN_STEPS // count_steps(1, train.examples, batch_size)))
    if old.objective != "sft":
        learning_rate = LEARNING_RATE / 2
    else:  # halved once: halved each night, it would be a thousandth after ten
        learning_rate = old.learning_rate / (2 if old.start_from is None else 1)
    spec = _on_new_data(old, train, valid, epochs, learning_rate, champion)
    return change_spec(spec, options, base, train.examples)


def fresh_spec(
    old: JobSpec, train: DatasetRecord, valid: DatasetRecord, base: Base, options: JobOptions = NO_OPTIONS
) -> JobSpec:
    """The champion's job once more from new weights, at the learning rate of a first training."""
    if old.objective == "sft" and old.start_from is None:
        learning_rate = old.learning_rate
    else:
        learning_rate = METHOD_DEFAULTS.get(old.method, {}).get("learning_rate", LEARNING_RATE)
    epochs = default_epochs(train.examples, options.batch_size or old.batch_size)
    spec = _on_new_data(old, train, valid, epochs, learning_rate, None)
    return change_spec(spec, options, base, train.examples)


def with_training_file(spec: JobSpec, train: DatasetRecord) -> JobSpec:
    """The spec with another training file; what is given in epochs becomes as many steps as they need."""
    steps = spec.steps if spec.epochs is None else count_steps(spec.epochs, train.examples, spec.batch_size)
    return JobSpec.model_validate(spec.model_dump() | {"train": train.id, "steps": steps})


def _on_new_data(
    old: JobSpec, train: DatasetRecord, valid: DatasetRecord, epochs: int, learning_rate: float, start: str | None
) -> JobSpec:
    changed = {
        "train": train.id,
        "valid": valid.id,
        "start_from": start,
        "train_on": "all" if old.train_on == "last" else old.train_on,  # the default of older jobs
        "steps": count_steps(epochs, train.examples, old.batch_size),
        "epochs": epochs,
        "candidates": (),  # of a sweep: the others are values of the best one
        "objective": "sft",
        "learning_rate": learning_rate,
    }
    return JobSpec.model_validate(old.model_dump() | changed)
