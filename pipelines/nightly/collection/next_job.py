"""The job that a nightly run submits for an adapter."""

from __future__ import annotations

from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.submission.defaults import LEARNING_RATE, MIN_STEPS, count_steps, resolve_spec
from loramill.submission.request import JobRequest
from loramill.types import DatasetRecord, JobSpec

#: Passes over the data of a nightly run that continues from the champion, if these are at least `MIN_STEPS` steps.
EPOCHS = 2


def first_spec(name: AdapterName, train: DatasetRecord, valid: DatasetRecord, base: Base) -> JobSpec:
    """A job with default hyperparameters, for an adapter without a version."""
    return resolve_spec(JobRequest(name, train.id, valid.id), base, train.examples)


def next_spec(old: JobSpec, champion: str, train: DatasetRecord, valid: DatasetRecord) -> JobSpec:
    """The champion's job, continued from its weights at half its learning rate.

    After preference tuning, the new answers are trained at half the default learning rate.
    """
    # Few examples make few steps per pass; the new ones are then learned at the cost of the old ones.
    epochs = max(EPOCHS, -(-MIN_STEPS // count_steps(1, train.examples, old.batch_size)))
    changed = {
        "train": train.id,
        "valid": valid.id,
        "start_from": champion,
        "train_on": "all" if old.train_on == "last" else old.train_on,  # the default of older jobs
        "steps": count_steps(epochs, train.examples, old.batch_size),
        "epochs": epochs,
        "candidates": (),  # of a sweep: the others are values of the best one
        "objective": "sft",
        "learning_rate": (old.learning_rate if old.objective == "sft" else LEARNING_RATE) / 2,
    }
    return JobSpec.model_validate(old.model_dump() | changed)


def with_training_file(spec: JobSpec, train: DatasetRecord) -> JobSpec:
    """The spec with another training file; what is given in epochs becomes as many steps as they need."""
    steps = spec.steps if spec.epochs is None else count_steps(spec.epochs, train.examples, spec.batch_size)
    return JobSpec.model_validate(spec.model_dump() | {"train": train.id, "steps": steps})
