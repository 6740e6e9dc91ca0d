"""Sorts valid rows of new data into what is trained on, what is held out, and the rest, and counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.collection.division import Division
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, fingerprints
from loramill.pipelines.nightly.collection.policy import Fate, assign
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.collection.rows import CheckedRows
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.types import ContentSide


@dataclass(frozen=True, slots=True)
class DecidedRow:
    """A valid row with its fate.

    Attributes:
        pair: the preference pair that it is of.
        group: the key of its value in the division of the rows; None: it has none.
        side: the side of that value.
    """

    raw: bytes
    pair: bytes | None
    validation: bool
    group: str | None
    side: ContentSide | None
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
        division: the sides of values, with those of the rows; None: content alone decides.
    """

    train: Sequence[DecidedRow]
    held: Sequence[DecidedRow]
    pairs: Sequence[DecidedRow]
    decided: Sequence[DecidedRow]
    counts: CollectedCounts
    division: Division | None = None


def sort_rows(
    checked: CheckedRows, known: Known, rules: SplitDefinition, min_pairs: int, division: Division | None = None
) -> SortedRows:
    """Decides the fates of all valid rows, in an order that depends on their content alone.

    Args:
        checked: the rows.
        known: the adapter's past.
        rules: of the split.
        min_pairs: with fewer preference pairs, none is trained on.
        division: the sides of values that were decided before; None: content alone decides.
    """
    division = None if division is None else _decide_values(checked, division)
    decided = _decide(checked, known, rules, division)
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
    return SortedRows(train, [each for each in decided if each.fate is Fate.HELD_OUT], pairs, decided, counts, division)


def _decide_values(checked: CheckedRows, division: Division) -> Division:
    """The division with the values of the rows."""
    keys = [(division.key(row.example.metadata), row.validation) for row in checked.valid]
    training, validation = ({key for key, each in keys if key is not None and each is part} for part in (False, True))
    return division.decide(training, validation, others_held_out=any(key is None for key, _ in keys))


def _decide(checked: CheckedRows, known: Known, rules: SplitDefinition, division: Division | None) -> list[DecidedRow]:
    found = fingerprints([row.example for row in checked.valid])
    # An example comes before a pair with the same answer: it is trained on as both.
    ordered = sorted(
        zip(checked.valid, found, strict=True),
        key=lambda each: (each[1].digest, each[0].pair is not None, each[0].pair or each[0].raw),
    )
    parts = [[each for each in ordered if each[0].validation is part] for part in (False, True)]
    keys = [[None if division is None else division.key(row.example.metadata) for row, _ in part] for part in parts]
    train, valid = ([each for _, each in part] for part in parts)
    train_sides, valid_sides = ([_side(division, key) for key in part] for part in keys)
    fates = assign(train, valid, known, rules, (train_sides, valid_sides))
    return [
        DecidedRow(row.raw, row.pair, row.validation, key, _side(division, key), fingerprint, fate)
        for part, part_keys, part_fates in zip(parts, keys, fates, strict=True)
        for (row, fingerprint), key, fate in zip(part, part_keys, part_fates, strict=True)
    ]


def _side(division: Division | None, key: str | None) -> ContentSide | None:
    return None if division is None or key is None else division.side(key)


def _trained_pairs(decided: Sequence[DecidedRow], known: Known) -> list[DecidedRow]:
    """The pairs whose better answer is trained on, now or before; one that is held out is in no pair."""
    trained = {each.digest for each, side in zip(known.examples, known.sides, strict=True) if side is ContentSide.TRAIN}
    trained |= {each.fingerprint.digest for each in decided if each.fate is Fate.TRAIN}
    usable = [each for each in decided if not each.validation and each.side is not ContentSide.HELD_OUT]
    pairs = [each for each in usable if each.pair is not None and each.fate in (Fate.TRAIN, Fate.REPEATED)]
    first: dict[bytes | None, DecidedRow] = {}  # of equal pairs, the first one is not repeated, and is recorded
    for each in pairs:
        if each.fingerprint.digest in trained:
            first.setdefault(each.pair, each)
    return list(first.values())
