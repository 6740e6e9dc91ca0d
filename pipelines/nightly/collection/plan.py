"""Plans one adapter's training: its new data, frozen into the datasets and the job spec of one nightly run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from loramill.data.examples import read_examples, read_row, row_format
from loramill.data.new_data import REPLAY_EXAMPLES, outlook, required_examples, sample
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, fingerprints
from loramill.pipelines.nightly.collection.next_job import first_spec, next_spec
from loramill.pipelines.nightly.collection.past import Past, find_past, known_content, old_rows, read_rows, record_past
from loramill.pipelines.nightly.collection.policy import Fate, assign, near_held_out
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.collection.rows import (
    CheckedRows,
    NewFile,
    check_rows,
    check_share,
    list_reasons,
    of_one_format,
    quarantine_file,
)
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.plural import counted
from loramill.registry import ArtifactStore, content, datasets
from loramill.types import ContentSide, DatasetRecord, JobSpec, NewData


@dataclass(frozen=True, slots=True)
class CollectionRules:
    """What collection does with new data.

    Attributes:
        minimum: the fewest examples to train on, old and new together.
        replay: number of old examples that are trained again with the new ones.
        split: how new examples are checked and split.
    """

    minimum: int = 1
    replay: int = REPLAY_EXAMPLES
    split: SplitDefinition = field(default_factory=SplitDefinition)


@dataclass(frozen=True, slots=True)
class InsufficientData:
    """The new data is not enough to train and evaluate with; `reason` states how much would be."""

    reason: str


@dataclass(frozen=True, slots=True)
class NothingNew:
    """The new data has no example to train on; `reason` says what it has."""

    reason: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Decided:
    """A valid row with its fate."""

    raw: bytes
    validation: bool
    fingerprint: Fingerprint
    fate: Fate


@dataclass(frozen=True, slots=True)
class _Freezer:
    """Stores the datasets of one adapter in one run."""

    session: Session
    artifacts: ArtifactStore
    name: AdapterName

    def freeze(self, kind: str, rows: Sequence[bytes]) -> DatasetRecord:
        filename = f"{self.name.adapter}-{kind}.jsonl"
        return freeze_rows(self.session, self.artifacts, self.name.tenant, filename, rows)


def plan_training(
    session: Session,
    artifacts: ArtifactStore,
    name: AdapterName,
    new_data: NewData,
    base: Base,
    run: str,
    rules: CollectionRules | None = None,
) -> dict[str, Any] | InsufficientData | NothingNew:
    """Creates the run's datasets and returns what to train.

    The training set is the new examples and a replay of old ones. Two slices are held out: `before`, the champion's
    validation set, and `new`, a part of the new data. The challenger's validation set is both. Old data that its
    tenant has deleted is left out. What is trained on and held out is recorded for all later runs.

    Returns:
        `{spec, champion, previous, slices: {name: dataset}, replay: {plain}, counts, quarantine: {file, reasons}}`.

    Raises:
        BaseUnusable: the champion belongs to another base.
        NotFound: the adapter or a file was deleted.
        DatasetInvalid: too many rows are bad.
    """
    rules = rules or CollectionRules()
    past = find_past(session, name, base)
    record_past(session, artifacts, name, past)
    known = known_content(session, name)
    old = old_rows(session, artifacts, name, past)
    checked = of_one_format(check_rows(_files(session, artifacts, new_data)), row_format(old[0]) if old else None)
    check_share(checked, rules.split.max_bad_rows)
    decided = _decide(checked, known, rules.split)
    counts = _count(decided, checked)
    train, held = ([each for each in decided if each.fate is fate] for fate in (Fate.TRAIN, Fate.HELD_OUT))
    freezer = _Freezer(session, artifacts, name)
    if not train:
        return NothingNew(f"nothing new: {counts.describe()}.", _collected(freezer, checked, counts))
    old_held = [each for each, side in zip(known.examples, known.sides, strict=True) if side is ContentSide.HELD_OUT]
    replay = _replay(old, [*old_held, *(each.fingerprint for each in held)], rules, past.champion or "")
    if (reason := _too_few(decided, replay, rules.minimum, evaluated=past.valid is not None)) is not None:
        return InsufficientData(reason)

    rows, held_rows = [each.raw for each in train], [each.raw for each in held]
    frozen = freezer.freeze("train", [*rows, *replay])
    before = read_rows(session, artifacts, past.valid) if past.valid else []
    valid = freezer.freeze("valid", [*before, *held_rows])
    slices = {"new": freezer.freeze("new", held_rows).id} if held else {}
    slices |= {"before": past.valid} if past.valid else {}
    if past.valid:
        content.move(session, name, past.valid, valid.id)
    for side, dataset, examples in ((ContentSide.TRAIN, frozen, train), (ContentSide.HELD_OUT, valid, held)):
        found = [(each.fingerprint.digest, each.fingerprint.sketch.tobytes()) for each in examples]
        content.record(session, name, side, found, dataset=dataset.id, run=run)
    spec = _spec(name, past, frozen, valid, base)
    versions = {"champion": past.champion, "previous": past.previous}
    planned = {"spec": spec.model_dump(mode="json"), "slices": slices, "replay": {"plain": len(replay)}} | versions
    return planned | _collected(freezer, checked, counts)


def freeze_rows(
    session: Session, artifacts: ArtifactStore, tenant: str, filename: str, rows: Sequence[bytes]
) -> DatasetRecord:
    """Validates rows and stores them as a dataset."""
    raw = b"\n".join(rows) + b"\n"
    examples = read_examples(raw, filename)
    return store_file(session, artifacts, tenant, filename, raw, len(examples.examples))


def store_file(
    session: Session, artifacts: ArtifactStore, tenant: str, filename: str, raw: bytes, rows: int
) -> DatasetRecord:
    """Stores a file of a tenant."""
    return datasets.create(session, tenant, filename, artifacts.put({"data.jsonl": raw}), len(raw), rows)


def _files(session: Session, artifacts: ArtifactStore, new_data: NewData) -> list[NewFile]:
    files = []
    for ids, validation in ((new_data.train, False), (new_data.valid, True)):
        for found in (datasets.get(session, each) for each in ids):
            files.append(NewFile(found.filename, artifacts.read(found.artifact, "data.jsonl"), validation))
    return files


def _decide(checked: CheckedRows, known: Known, rules: SplitDefinition) -> list[_Decided]:
    """The fates of all valid rows, in an order that depends on their content alone."""
    found = fingerprints([row.example for row in checked.valid])
    pairs = sorted(zip(checked.valid, found, strict=True), key=lambda pair: (pair[1].digest, pair[0].raw))
    train, valid = ([pair for pair in pairs if pair[0].validation is part] for part in (False, True))
    fates = assign([each for _, each in train], [each for _, each in valid], known, rules)
    return [
        _Decided(row.raw, row.validation, fingerprint, fate)
        for part, part_fates in zip((train, valid), fates, strict=True)
        for (row, fingerprint), fate in zip(part, part_fates, strict=True)
    ]


def _count(decided: Sequence[_Decided], checked: CheckedRows) -> CollectedCounts:
    fates = Counter(each.fate for each in decided)
    return CollectedCounts(
        train=fates[Fate.TRAIN],
        held_out=fates[Fate.HELD_OUT],
        repeated=fates[Fate.REPEATED],
        leaked=fates[Fate.LEAKED],
        trained=fates[Fate.TRAINED],
        quarantined=len(checked.bad),
    )


def _replay(old: Sequence[bytes], held_out: Sequence[Fingerprint], rules: CollectionRules, seed: str) -> list[bytes]:
    """A sample of old examples, without any that equals or resembles a held-out one."""
    chosen = sample(old, rules.replay, seed)
    found = fingerprints([read_row(row, line) for line, row in enumerate(chosen, 1)])
    leaked = near_held_out(found, held_out, rules.split.near_duplicate)
    return [row for row, out in zip(chosen, leaked, strict=True) if not out]


def _too_few(decided: Sequence[_Decided], replay: Sequence[bytes], minimum: int, *, evaluated: bool) -> str | None:
    """Why there is too little new data; None if there is enough.

    Args:
        evaluated: whether the champion has a validation set to evaluate on.
    """
    new = [each for each in decided if each.fate in (Fate.TRAIN, Fate.HELD_OUT)]
    validation = sum(each.validation for each in new)
    examples = len(new) - validation
    if examples < required_examples(validation=bool(validation), replay=len(replay), minimum=minimum):
        return outlook(examples, validation, replay=len(replay), minimum=minimum)
    if not evaluated and all(each.fate is Fate.TRAIN for each in new):
        return f"{counted(examples, 'new example')}, all alike, so that none can be held out: add different ones."
    return None


def _spec(name: AdapterName, past: Past, train: DatasetRecord, valid: DatasetRecord, base: Base) -> JobSpec:
    if past.job is not None and past.champion is not None:
        return next_spec(past.job, past.champion, train, valid)
    return first_spec(name, train, valid, base)


def _collected(freezer: _Freezer, checked: CheckedRows, counts: CollectedCounts) -> dict[str, Any]:
    """The counts for the run's record, with the file of quarantined rows, which is stored here."""
    collected: dict[str, Any] = {"counts": counts.model_dump(mode="json")}
    if not checked.bad:
        return collected
    raw, filename = quarantine_file(checked.bad), f"{freezer.name.adapter}-quarantine.jsonl"
    file = store_file(freezer.session, freezer.artifacts, freezer.name.tenant, filename, raw, len(checked.bad))
    return collected | {"quarantine": {"file": file.id, "reasons": list_reasons(checked.bad)}}
