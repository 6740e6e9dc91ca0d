"""The collection stage: an adapter's new data, frozen into the datasets and the job spec of one nightly run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from loramill.data import jsonl
from loramill.data.examples import read_examples
from loramill.data.new_data import REPLAY_EXAMPLES, hold_out, outlook, required_examples, sample
from loramill.errors import BaseUnusable
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.plural import counted
from loramill.registry import ArtifactStore, adapters, datasets, jobs, nightly
from loramill.submission.defaults import LEARNING_RATE, MIN_STEPS, count_steps, resolve_spec
from loramill.submission.request import JobRequest
from loramill.types import DatasetRecord, JobSpec, NewData, StepStatus, VersionRecord

#: Passes over the data of a nightly run that continues from the champion, if these are at least `MIN_STEPS` steps.
EPOCHS = 2


@dataclass(frozen=True, slots=True)
class InsufficientData:
    """The new data is not enough to train and evaluate with; `reason` states how much would be."""

    reason: str


def collect_all(context: NightlyContext) -> None:
    """Freezes each adapter's new data into datasets for this run."""
    with context.registry.reading() as session:
        adapters_with_data = [data.adapter for data in nightly.pending_data(session)]
    ended = {step.adapter for step in context.steps() if step.status is not StepStatus.PENDING}
    for adapter in adapters_with_data:
        if adapter not in ended:  # data that arrived after this run had collected is for the next run
            context.attempt(adapter, "collect", partial(_collect_adapter, context, adapter))


def _collect_adapter(context: NightlyContext, adapter: str) -> None:
    name = AdapterName.parse(adapter)
    with context.registry.writing() as session:
        if new_data := nightly.collect(session, context.run.id, name):
            minimum = context.settings.jobs.min_examples
            plan = plan_training(session, context.registry.artifacts, name, new_data, context.base, minimum)
            if isinstance(plan, InsufficientData):
                nightly.release(session, context.run.id, name)
                context.report(context.record_pending(session, adapter, "collect", {"waiting": plan.reason}))
            else:
                context.finish(session, adapter, "collect", plan)


def plan_training(
    session: Session, artifacts: ArtifactStore, name: AdapterName, new_data: NewData, base: Base, minimum: int = 1
) -> dict[str, Any] | InsufficientData:
    """Creates the run's datasets and returns what to train: `{spec, champion, previous, slices: {name: dataset}}`.

    The training set is the new examples and a replay of old ones. Two slices are held out: `before`, the champion's
    validation set, and `new`, a part of the new data. The challenger's validation set is both. Old data that its
    tenant has deleted is left out.

    Args:
        minimum: the fewest examples to train on, old and new together.

    Raises:
        BaseUnusable: the champion belongs to another base.
        NotFound: the adapter or a file was deleted.
        DatasetInvalid: the old and the new data cannot be combined.
    """
    adapter = adapters.get(session, name)
    champion, previous = adapter.champion, adapter.previous
    origin = _version(session, name, champion, base).job if champion else None
    if previous and adapters.get_version(session, previous).base != base.fingerprint:
        previous = None  # it cannot be served any more
    old = jobs.get(session, origin).spec if origin else None
    # Preferences are not trained together with answers.
    old_files = (old.train, old.valid) if old and old.objective == "sft" else (None, None)
    existing = datasets.example_counts(session, filter(None, old_files))
    old_train, old_valid = (file if file in existing else None for file in old_files)

    new, new_valid = (_rows(session, artifacts, files) for files in (new_data.train, new_data.valid))
    replay = sample(_rows(session, artifacts, [old_train]), REPLAY_EXAMPLES)
    if len(new) < required_examples(validation=bool(new_valid), replay=len(replay), minimum=minimum):
        return InsufficientData(outlook(len(new), len(new_valid), replay=len(replay), minimum=minimum))
    new_count = len(new)
    if not new_valid:
        new, new_valid = hold_out(new)
    if not new:
        return InsufficientData(
            f"{counted(new_count, 'new example')}, all identical, so none can be held out: add different ones."
        )

    def freeze(kind: str, rows: Sequence[bytes]) -> DatasetRecord:
        return freeze_rows(session, artifacts, name.tenant, f"{name.adapter}-{kind}.jsonl", rows)

    train = freeze("train", new + replay)
    valid = freeze("valid", _rows(session, artifacts, [old_valid]) + new_valid)
    slices = {"new": freeze("new", new_valid).id} | ({"before": old_valid} if old_valid else {})
    spec = next_spec(old, champion, train, valid) if old and champion else first_spec(name, train, valid, base)
    return {"spec": spec.model_dump(mode="json"), "champion": champion, "previous": previous, "slices": slices}


def _rows(session: Session, artifacts: ArtifactStore, files: Iterable[str | None]) -> list[bytes]:
    """The rows of several datasets, one after another."""
    found = (datasets.get(session, file) for file in files if file is not None)
    return [row for dataset in found for row in jsonl_rows(artifacts.read(dataset.artifact, "data.jsonl"))]


def _version(session: Session, name: AdapterName, champion: str, base: Base) -> VersionRecord:
    """The champion, which must belong to the base in use, since training continues from its weights.

    Raises:
        BaseUnusable: it belongs to another base.
    """
    version = adapters.get_version(session, champion)
    if version.base != base.fingerprint:
        short = SHORT_HASH_LENGTH
        raise BaseUnusable(
            f"The champion {champion[:short]} of '{name}' was trained on another base ({version.base[:short]}) than "
            f"the one in use, {base.name} ({base.fingerprint[:short]}): set `base` to that one again, or submit a job "
            f"for '{name}' and promote its version."
        )
    return version


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


def freeze_rows(
    session: Session, artifacts: ArtifactStore, tenant: str, filename: str, rows: Sequence[bytes]
) -> DatasetRecord:
    """Validates rows and stores them as a dataset."""
    raw = b"\n".join(rows) + b"\n"
    examples = read_examples(raw, filename)
    artifact = artifacts.put({"data.jsonl": raw})
    return datasets.create(session, tenant, filename, artifact, len(raw), len(examples.examples))


def jsonl_rows(raw: bytes) -> list[bytes]:
    """The rows of a JSONL file, without blank lines and byte order marks."""
    return [row for _, row in jsonl.iter_rows(raw)]
