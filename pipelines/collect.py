"""Collect: an adapter's new data, frozen into the datasets and the job spec of one night."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from loramill import jsonl
from loramill.bases import Base
from loramill.dataset import read_examples
from loramill.names import AdapterName
from loramill.recipe import resolve_spec, steps_of
from loramill.registry import ArtifactStore, adapters, datasets, jobs
from loramill.types import DatasetRecord, JobSpec, NewData

#: Old examples trained again beside the new ones; they halve forgetting.
REPLAY = 64
#: Share of new data that is held out when no validation file came with it.
HOLD_OUT = 0.1
#: Passes over a night's data when it goes on from the champion.
EPOCHS = 2


def collect(
    session: Session, artifacts: ArtifactStore, name: AdapterName, new_data: NewData, base: Base
) -> dict[str, Any]:
    """Makes the night's datasets and says what to train: `{spec, champion, slices: {name: dataset}}`.

    Training sees the new examples and a replay of old ones. Two slices are held out: `before`, what the
    champion was judged by, and `new`, the new data's own. The challenger's validation set is both. Old data that
    its tenant has deleted is left out.
    """
    champion = adapters.get(session, name).champion
    origin = adapters.version(session, champion).job if champion else None
    old = jobs.get(session, origin).spec if origin else None

    def rows(dataset: str | None) -> list[bytes]:
        if dataset is None:
            return []
        return lines(artifacts.read(datasets.get(session, dataset).artifact, "data.jsonl"))

    def freeze(kind: str, content: Sequence[bytes]) -> DatasetRecord:
        return freeze_rows(session, artifacts, name.tenant, f"{name.adapter}-{kind}.jsonl", content)

    new = [row for dataset in new_data.train for row in rows(dataset)]
    new_valid = [row for dataset in new_data.valid for row in rows(dataset)]
    if not new_valid:
        new, new_valid = hold_out(new)
    there = datasets.counts(session, filter(None, (old.train, old.valid))) if old else {}
    known, judge = (file if file in there else None for file in ((old.train, old.valid) if old else (None, None)))
    before = rows(judge)
    train = freeze("train", new + sample(rows(known), REPLAY))
    valid = freeze("valid", before + new_valid)
    slices = {"new": freeze("new", new_valid).id} | ({"before": judge} if judge else {})
    spec = next_spec(old, champion, train, valid) if old and champion else first_spec(name, train, valid, base)
    return {"spec": spec.model_dump(mode="json"), "champion": champion, "slices": slices}


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
    changed = {
        "train": train.id,
        "valid": valid.id,
        "start_from": champion,
        "steps": steps_of(EPOCHS, train.examples, old.batch_size),
        "epochs": EPOCHS,
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


def lines(raw: bytes) -> list[bytes]:
    """The rows of a JSONL file, without blank lines and byte order marks."""
    return [row for _, row in jsonl.rows(raw)]


def hold_out(rows: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Splits rows into (train, held out) by their content, so that the same row always falls on the same side."""
    ordered = sorted(rows, key=digest)
    count = max(1, round(len(ordered) * HOLD_OUT))
    held = set(ordered[:count])
    return [row for row in rows if row not in held], ordered[:count]


def sample(rows: Sequence[bytes], count: int) -> list[bytes]:
    """At most `count` rows, chosen by their content: the same rows give the same sample."""
    return sorted(rows, key=digest)[:count]


def digest(row: bytes) -> bytes:
    """A row's place in a random-looking, repeatable order."""
    return hashlib.sha256(json.dumps(jsonl.parse(row), sort_keys=True).encode()).digest()
