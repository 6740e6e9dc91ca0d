"""Sorts valid rows of new data into what is trained on, what is held out, and the rest, and counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, fingerprints
from loramill.pipelines.nightly.collection.policy import Fate, assign
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.collection.rows import CheckedRows
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.types import ContentSide


@dataclass(frozen=True, slots=True)
class DecidedRow:
    """A valid row with its fate; `pair` is the preference pair that it is of."""

    raw: bytes
    pair: bytes | None
    validation: bool
    fingerprint: Fingerprint
    fate: Fate


@dataclass(frozen=True, slots=True)
class SortedRows:
    """Rows by what becomes of them.

    Attributes:
        train: new examples to train on.
        held: new examples that are held out, and the better answers of pairs that are.
        pairs: preference pairs to train on.
        decided: all rows.
    """

    train: Sequence[DecidedRow]
    held: Sequence[DecidedRow]
    pairs: Sequence[DecidedRow]
    decided: Sequence[DecidedRow]
    counts: CollectedCounts


def sort_rows(checked: CheckedRows, known: Known, rules: SplitDefinition, min_pairs: int) -> SortedRows:
    """Decides the fates of all valid rows, in an order that depends on their content alone.

    Args:
        checked: the rows.
        known: the adapter's past.
        rules: of the split.
        min_pairs: with fewer preference pairs, none is trained on.
    """
    decided = _decide(checked, known, rules)
    pairs = _trained_pairs(decided, known)
    pairs = pairs if len(pairs) >= min_pairs else []
    fates = Counter(each.fate for each in decided)
    train = [each for each in decided if each.fate is Fate.TRAIN and each.pair is None]
    unused = fates[Fate.TRAIN] + fates[Fate.REPEATED] - len(train) - len(pairs)
    counts = CollectedCounts(
        train=len(train),
        pairs=len(pairs),
        held_out=fates[Fate.HELD_OUT],
        repeated=unused,
        leaked=fates[Fate.LEAKED],
        trained=fates[Fate.TRAINED],
        quarantined=len(checked.bad),
    )
    return SortedRows(train, [each for each in decided if each.fate is Fate.HELD_OUT], pairs, decided, counts)


def _decide(checked: CheckedRows, known: Known, rules: SplitDefinition) -> list[DecidedRow]:
    found = fingerprints([row.example for row in checked.valid])
    # An example comes before a pair with the same answer: it is trained on as both.
    ordered = sorted(
        zip(checked.valid, found, strict=True),
        key=lambda each: (each[1].digest, each[0].pair is not None, each[0].pair or each[0].raw),
    )
    train, valid = ([each for each in ordered if each[0].validation is part] for part in (False, True))
    fates = assign([each for _, each in train], [each for _, each in valid], known, rules)
    return [
        DecidedRow(row.raw, row.pair, row.validation, fingerprint, fate)
        for part, part_fates in zip((train, valid), fates, strict=True)
        for (row, fingerprint), fate in zip(part, part_fates, strict=True)
    ]


def _trained_pairs(decided: Sequence[DecidedRow], known: Known) -> list[DecidedRow]:
    """The pairs whose better answer is trained on, now or before; one that is held out is in no pair."""
    trained = {each.digest for each, side in zip(known.examples, known.sides, strict=True) if side is ContentSide.TRAIN}
    trained |= {each.fingerprint.digest for each in decided if each.fate is Fate.TRAIN}
    pairs = [each for each in decided if each.pair is not None and each.fate in (Fate.TRAIN, Fate.REPEATED)]
    return list({each.pair: each for each in pairs if each.fingerprint.digest in trained}.values())
