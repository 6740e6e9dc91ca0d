"""Plans one adapter's training: its new data, frozen into the datasets and the job spec of one nightly run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy.orm import Session

from loramill.data.examples import read_row, row_format
from loramill.data.new_data import REPLAY_EXAMPLES, outlook, required_examples, shuffled
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, fingerprints
from loramill.pipelines.nightly.collection.freeze import Freezer, collected_result, new_files
from loramill.pipelines.nightly.collection.lengths import of_trainable_length
from loramill.pipelines.nightly.collection.next_job import job_spec, starts_of
from loramill.pipelines.nightly.collection.past import (
    Past,
    find_past,
    known_content,
    known_division,
    old_rows,
    originals,
    read_rows,
    record_past,
)
from loramill.pipelines.nightly.collection.policy import Fate, near_held_out
from loramill.pipelines.nightly.collection.preferences import PreferenceFiles, preference_spec
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.collection.rows import (
    check_files,
    check_share,
    of_one_format,
    too_few_pairs,
    with_enough_pairs,
)
from loramill.pipelines.nightly.collection.sorting import DecidedRow, SortedRows, sort_rows
from loramill.pipelines.nightly.definition import SplitDefinition, TrainDefinition
from loramill.plural import counted
from loramill.registry import ArtifactStore, content, nightly
from loramill.types import ContentSide, NewData


@dataclass(frozen=True, slots=True)
class CollectionRules:
    """What collection does with new data.

    Attributes:
        minimum: the fewest examples to train on, old and new together.
        replay: number of old examples that are trained again with the new ones.
        split: how new examples are checked and split.
        train: where training starts, and the options of its jobs.
        min_pairs: the fewest preference pairs to train on.
    """

    minimum: int = 1
    replay: int = REPLAY_EXAMPLES
    split: SplitDefinition = field(default_factory=SplitDefinition)
    train: TrainDefinition = field(default_factory=TrainDefinition)
    min_pairs: int = 1


@dataclass(frozen=True, slots=True)
class InsufficientData:
    """The new data is not enough to train and evaluate with; `reason` states how much would be."""

    reason: str


@dataclass(frozen=True, slots=True)
class NothingNew:
    """The new data has no example to train on; `reason` says what it has."""

    reason: str
    result: dict[str, Any]


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
        `{spec, fresh, preferences, champion, previous, slices: {name: dataset}, replay: {plain}, counts,
        quarantine: {file, reasons}}`. `fresh` is the spec of a second job, from new weights, and `preferences` are
        pairs to train on after the examples, if there are such.

    Raises:
        BaseUnusable: the champion belongs to another base.
        NotFound: the adapter or a file was deleted.
        DatasetInvalid: too many rows are bad.
        InvalidRequest: the options of the jobs do not fit the base, or the champion.
    """
    rules = rules or CollectionRules()
    past = find_past(session, name, base)
    record_past(session, artifacts, name, past)
    known = known_content(session, name)
    old = old_rows(session, artifacts, past)
    found, waiting = check_files(new_files(session, artifacts, new_data), rules.min_pairs)
    nightly.release_files(session, run, name, waiting)
    checked = of_one_format(found, row_format(old[0]) if old else None)
    checked = of_trainable_length(checked, base, past.job, rules.train.options)
    if (few := too_few_pairs(checked, rules.min_pairs)) is not None:
        return InsufficientData(few)
    checked = with_enough_pairs(checked, rules.min_pairs)
    check_share(checked, rules.split.max_bad_rows)
    division = known_division(session, artifacts, past, known, old, rules.split)
    rows = sort_rows(checked, known, rules.split, rules.minimum, division)
    work = _Work(Freezer(session, artifacts, name), past, base, run, rules, rows)
    if not rows.train and not rows.pairs:
        if held := sum(not each.validation for each in rows.held):
            return InsufficientData(f"{counted(held, 'new example')}, and none to train on. {_kept_out(rules)}")
        result = collected_result(work.freezer, checked, rows.counts)
        return NothingNew(f"nothing new: {rows.counts.describe()}.", result)
    planned = _plan_examples(work, old, known) if rows.train else _plan_preferences(work, new_data)
    if isinstance(planned, InsufficientData):
        return planned
    if rows.train and rows.pairs:
        planned["preferences"] = _freeze_pairs(work, new_data).model_dump(mode="json")
    versions = {"champion": past.champion, "previous": past.previous}
    return planned | versions | collected_result(work.freezer, checked, rows.counts)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a plan is made of."""

    freezer: Freezer
    past: Past
    base: Base
    run: str
    rules: CollectionRules
    rows: SortedRows

    def record(self, side: ContentSide, dataset: str, rows: Sequence[DecidedRow]) -> None:
        """Records the content of rows for later runs, and the sides of their values."""
        new = [each for each in rows if each.fate is not Fate.REPEATED]  # a pair of an example that is recorded
        found = {each.fingerprint.digest: each.fingerprint.sketch.tobytes() for each in new}
        found |= {each.group: b"" for each in rows if each.group is not None and each.side is side}
        content.record(
            self.freezer.session, self.freezer.name, side, list(found.items()), dataset=dataset, run=self.run
        )


def _plan_examples(work: _Work, rows_before: Sequence[bytes], known: Known) -> dict[str, Any] | InsufficientData:
    """The jobs on new examples, with the old ones that are replayed."""
    past, rules, freezer = work.past, work.rules, work.freezer
    old_held = [each for each, side in zip(known.examples, known.sides, strict=True) if side is ContentSide.HELD_OUT]
    kept_out = [*old_held, *(each.fingerprint for each in work.rows.held)]
    starts = starts_of(rules.train.start, past)
    # New weights have to learn everything that the champion was trained on.
    old = filter(originals(known), shuffled(rows_before, past.champion or ""))
    replay = _replay(old if starts[0] == "fresh" else islice(old, rules.replay), kept_out, work)
    if (reason := _too_few(work.rows.decided, replay, rules, evaluated=past.valid is not None)) is not None:
        return InsufficientData(reason)

    rows, held_rows = [each.raw for each in work.rows.train], [each.raw for each in work.rows.held]
    frozen = freezer.freeze("train", [*rows, *replay])
    before = read_rows(freezer.session, freezer.artifacts, past.valid) if past.valid else []
    valid = freezer.freeze("valid", [*before, *held_rows])
    slices = {"new": freezer.freeze("new", held_rows).id} if held_rows else {}
    slices |= {"before": past.valid} if past.valid else {}
    if past.valid:
        content.move(freezer.session, freezer.name, past.valid, valid.id)
    work.record(ContentSide.TRAIN, frozen.id, work.rows.train)
    work.record(ContentSide.HELD_OUT, valid.id, work.rows.held)
    job = partial(job_spec, freezer.name, past, work.base, rules.train.options, valid)
    spec = job(frozen, starts[0])
    planned = {"spec": spec.model_dump(mode="json"), "slices": slices, "replay": {"plain": len(replay)}}
    if "fresh" in starts[1:]:
        everything = freezer.freeze("train-fresh", [*rows, *replay, *_replay(old, kept_out, work)])
        planned["fresh"] = job(everything, "fresh").model_dump(mode="json")
    return planned


def _plan_preferences(work: _Work, new_data: NewData) -> dict[str, Any] | InsufficientData:
    """The job on preference pairs alone."""
    past, freezer = work.past, work.freezer
    if past.champion is None:
        pairs = counted(len(work.rows.pairs), "preference pair")
        return InsufficientData(f"{pairs}, which wait for the adapter's first champion: add examples.")
    held_rows = [each.raw for each in work.rows.held]
    slices = {"new": freezer.freeze("new", held_rows).id} if held_rows else {}
    slices |= {"before": past.valid} if past.valid else {}
    files = _freeze_pairs(work, new_data)
    work.record(ContentSide.HELD_OUT, slices.get("new", ""), work.rows.held)
    spec = preference_spec(freezer.name, files, work.base, past.champion, past.job)
    return {"spec": spec.model_dump(mode="json"), "slices": slices}


def _freeze_pairs(work: _Work, new_data: NewData) -> PreferenceFiles:
    """Stores the pairs to train on, and those that are held out to validate with."""
    pairs, freezer = work.rows.pairs, work.freezer
    train = freezer.freeze("pairs", [each.pair for each in pairs if each.pair is not None])
    held = [each.pair for each in work.rows.held if each.pair is not None]
    valid = freezer.freeze("pairs-valid", held).id if held else None
    work.record(ContentSide.TRAIN, train.id, pairs)
    return PreferenceFiles(train=train.id, valid=valid, pairs=len(pairs), sources=new_data.train)


def _replay(old: Iterable[bytes], held_out: Sequence[Fingerprint], work: _Work) -> list[bytes]:
    """Old examples, without any that equals or resembles a held-out one, or whose value is held out."""
    examples = [(row, read_row(row, line)) for line, row in enumerate(old, 1)]
    if (division := work.rows.division) is not None:
        examples = [(row, each) for row, each in examples if not division.holds_out(each.metadata)]
    found = fingerprints([each for _, each in examples])
    leaked = near_held_out(found, held_out, work.rules.split.near_duplicate)
    return [row for (row, _), out in zip(examples, leaked, strict=True) if not out]


def _too_few(
    decided: Sequence[DecidedRow], replay: Sequence[bytes], rules: CollectionRules, *, evaluated: bool
) -> str | None:
    """Why there is too little new data; None if there is enough.

    Args:
        evaluated: whether the champion has a validation set to evaluate on.
    """
    new = [each for each in decided if each.fate in (Fate.TRAIN, Fate.HELD_OUT) and each.pair is None]
    validation = sum(each.validation for each in new)
    examples, minimum = len(new) - validation, rules.minimum
    share = rules.split.held_out
    if examples < required_examples(validation=bool(validation), replay=len(replay), minimum=minimum, share=share):
        return outlook(examples, validation, replay=len(replay), minimum=minimum, share=share)
    trained = sum(each.fate is Fate.TRAIN for each in new)
    if trained + len(replay) < minimum:
        few = f"{counted(examples, 'new example')}, {trained} of them to train on; at least {minimum - len(replay)} are"
        return f"{few} needed. {_kept_out(rules)}"
    if trained < len(new):
        return None
    if rules.split.by is not None:
        return f"{counted(examples, 'new example')}, and none to hold out. {_kept_out(rules)}"
    if not evaluated:
        return f"{counted(examples, 'new example')}, all alike, so that none can be held out: add different ones."
    return None


def _kept_out(rules: CollectionRules) -> str:
    """What to do if the values of a field leave too few examples on one side."""
    by = rules.split.by
    return f"Add examples, with other values of {by}." if by is not None else "Add different ones."
