"""Collect: an adapter's new data, frozen into the datasets and the job spec of one night."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from loramill.data import jsonl
from loramill.data.examples import read_examples
from loramill.data.new_data import REPLAY_EXAMPLES, hold_out, outlook, required_examples, sample
from loramill.errors import BaseUnusable
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.plural import counted
from loramill.registry import ArtifactStore, adapters, datasets, jobs
from loramill.submission.defaults import MIN_STEPS, count_steps, resolve_spec
from loramill.types import DatasetRecord, JobSpec, NewData, VersionRecord

#: Passes over the data of a nightly run that continues from the champion, if these are at least `MIN_STEPS` steps.
EPOCHS = 2


@dataclass(frozen=True, slots=True)
class InsufficientData:
    """The new data isn't enough to train and evaluate with; `reason` says what would be."""

    reason: str


def collect(
    session: Session, artifacts: ArtifactStore, name: AdapterName, new_data: NewData, base: Base, minimum: int = 1
) -> dict[str, Any] | InsufficientData:
    """Makes the night's datasets and says what to train: `{spec, champion, slices: {name: dataset}}`.

    Training sees the new examples and a replay of old ones. Two slices are held out: `before`, what the
    champion was judged by, and `new`, the new data's own. The challenger's validation set is both. Old data that
    its tenant has deleted is left out.

    Args:
        minimum: examples that training needs at least, old and new together.

    Raises:
        BaseUnusable: the champion is of another base.
        NotFound: the adapter or a file was deleted.
        DatasetInvalid: the old and the new data don't go together.
    """
    champion = adapters.get(session, name).champion
    origin = _version(session, name, champion, base).job if champion else None
    old = jobs.get(session, origin).spec if origin else None

    def rows(dataset: str | None) -> list[bytes]:
        if dataset is None:
            return []
        return jsonl_rows(artifacts.read(datasets.get(session, dataset).artifact, "data.jsonl"))

    def freeze(kind: str, content: Sequence[bytes]) -> DatasetRecord:
        return freeze_rows(session, artifacts, name.tenant, f"{name.adapter}-{kind}.jsonl", content)

    new = [row for dataset in new_data.train for row in rows(dataset)]
    new_valid = [row for dataset in new_data.valid for row in rows(dataset)]
    count, validation = len(new), len(new_valid)
    if not new_valid:
        new, new_valid = hold_out(new)
    there = datasets.example_counts(session, filter(None, (old.train, old.valid))) if old else {}
    known, judge = (file if file in there else None for file in ((old.train, old.valid) if old else (None, None)))
    replay = sample(rows(known), REPLAY_EXAMPLES)
    if count < required_examples(validation=bool(validation), replay=len(replay), minimum=minimum):
        return InsufficientData(outlook(count, validation, replay=len(replay), minimum=minimum))
    if not new:
        return InsufficientData(
            f"{counted(count, 'new example')}, all identical, so that none can be held out: add different ones."
        )
    before = rows(judge)
    train = freeze("train", new + replay)
    valid = freeze("valid", before + new_valid)
    slices = {"new": freeze("new", new_valid).id} | ({"before": judge} if judge else {})
    spec = next_spec(old, champion, train, valid) if old and champion else first_spec(name, train, valid, base)
    return {"spec": spec.model_dump(mode="json"), "champion": champion, "slices": slices}


def _version(session: Session, name: AdapterName, champion: str, base: Base) -> VersionRecord:
    """The champion, which must be of the base that runs now, since training continues from its weights.

    Raises:
        BaseUnusable: it is of another base.
    """
    version = adapters.get_version(session, champion)
    if version.base != base.fingerprint:
        raise BaseUnusable(
            f"The champion {champion[:SHORT_HASH_LENGTH]} of '{name}' was trained on another base "
            f"({version.base[:SHORT_HASH_LENGTH]}) than "
            f"the one in use, {base.name} ({base.fingerprint[:SHORT_HASH_LENGTH]}): set `base` to that one again, or "
            "submit a job "
            f"for '{name}' and promote its version."
        )
    return version


def first_spec(name: AdapterName, train: DatasetRecord, valid: DatasetRecord, base: Base) -> JobSpec:
    """The default recipe, for an adapter without a version."""
    return resolve_spec(
        base=base.fingerprint,
        context_length=base.context_length,
        adapter=str(name),
        train=train.id,
        valid=valid.id,
        examples=train.examples,
    )


def next_spec(old: JobSpec, champion: str, train: DatasetRecord, valid: DatasetRecord) -> JobSpec:
    """The champion's recipe, gone on with from its weights at half its learning rate."""
    # A few examples make few steps per pass; the new is then learned at the cost of the old.
    epochs = max(EPOCHS, -(-MIN_STEPS // count_steps(1, train.examples, old.batch_size)))
    changed = {
        "train": train.id,
        "valid": valid.id,
        "start_from": champion,
        "train_on": "all" if old.train_on == "last" else old.train_on,  # the default of older jobs
        "steps": count_steps(epochs, train.examples, old.batch_size),
        "epochs": epochs,
        "learning_rate": old.learning_rate / 2,
    }
    return old.model_copy(update=changed)


def freeze_rows(
    session: Session, artifacts: ArtifactStore, tenant: str, filename: str, rows: Sequence[bytes]
) -> DatasetRecord:
    """Validates rows and records them as a dataset."""
    raw = b"\n".join(rows) + b"\n"
    examples = read_examples(raw, filename)
    artifact = artifacts.put({"data.jsonl": raw})
    return datasets.create(session, tenant, filename, artifact, len(raw), len(examples.examples))


def jsonl_rows(raw: bytes) -> list[bytes]:
    """The rows of a JSONL file, without blank lines and byte order marks."""
    return [row for _, row in jsonl.iter_rows(raw)]
