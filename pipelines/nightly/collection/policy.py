"""Decides which new examples are trained on, held out, or left out. A pure function of their content and of the past.

The rules, over all runs, files and sources of an adapter:

- A held-out example, or a near-duplicate of one, is never trained on.
- What was trained on, or is a near-duplicate of it, is never held out: a champion that has seen an example would be
  compared on it with a challenger that has not.
- Near-duplicates that arrive together are on one side. The connected components of the relation are kept whole, since
  A may resemble B and B resemble C without A resembling C.
- With `split.by`, the value of a field decides the side of an example (`division.py`). Of near-duplicates on two such
  sides, those to train on are left out if the other is held out now, and those to hold out if the other was trained on.
- The components to hold out are chosen by their smallest digest, so that neither the order of examples nor files
  matters. A decision is recorded, so that it holds in all later runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum

from loramill.data.new_data import held_out_count
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint
from loramill.pipelines.nightly.collection.relation import Known, Relation
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.types import ContentSide

#: The side of each example whose value of a field decides it; None: its content does.
Sides = Sequence[ContentSide | None]


class Fate(StrEnum):
    """What becomes of a new example."""

    TRAIN = "train"
    HELD_OUT = "held out"
    REPEATED = "repeated"  # equal to another one, or to one that was used before
    LEAKED = "leaked"  # equal or near to a held-out one, so that it must not be trained on
    TRAINED = "trained"  # of a validation file: equal or near to what was trained on


def assign(
    train: Sequence[Fingerprint],
    valid: Sequence[Fingerprint],
    known: Known,
    rules: SplitDefinition,
    sides: tuple[Sides, Sides] | None = None,
) -> tuple[list[Fate], list[Fate]]:
    """Decides the fates of the examples of training files and of validation files, in their order.

    Without a validation example to hold out, a part of the training examples is held out, unless all of them resemble
    each other or what was trained on.

    Args:
        train: the examples of training files.
        valid: those of validation files.
        known: the adapter's past.
        rules: of the split.
        sides: the sides of both that values decide; None: content decides for all.
    """
    train_sides, valid_sides = sides or ([None] * len(train), [None] * len(valid))
    # An example of a training file whose value is held out has the fate of a validation example.
    apart = [side is ContentSide.HELD_OUT for side in train_sides]
    held = [each for each, out in zip(train, apart, strict=True) if out]
    rest = [each for each, out in zip(train, apart, strict=True) if not out]
    decided = [*valid_sides, *(side for side in train_sides if side is ContentSide.HELD_OUT)]
    decided += [side for side in train_sides if side is not ContentSide.HELD_OUT]
    rest_fates, held_fates = _assign(rest, [*valid, *held], len(valid), known, rules, decided)
    of_rest, of_held = iter(rest_fates), iter(held_fates[len(valid) :])
    return [next(of_held if out else of_rest) for out in apart], held_fates[: len(valid)]


def _assign(
    train: Sequence[Fingerprint],
    valid: Sequence[Fingerprint],
    files: int,
    known: Known,
    rules: SplitDefinition,
    sides: Sides,
) -> tuple[list[Fate], list[Fate]]:
    """As `assign`; the first `files` examples of `valid` are of validation files, and `sides` are of both in order."""
    table = {
        each.digest: (side, used) for each, side, used in zip(known.examples, known.sides, known.used, strict=True)
    }
    valid_fates = _exact_fates(valid, table, training=False)
    new_valid = {each.digest for each, fate in zip(valid, valid_fates, strict=True) if fate is None}
    # Examples of both kinds have one numbering: those of validation files come first.
    examples = [*valid, *train]
    fates = [*valid_fates, *_exact_fates(train, table, training=True, validation=new_valid)]
    undecided = [index for index, fate in enumerate(fates) if fate is None]
    relation = Relation(examples, undecided, known, rules.near_duplicate)

    to_train = []
    for index in undecided:
        # Examples of a run whose data was released keep their side.
        side, _ = table.get(examples[index].digest, (None, False))
        if index < len(valid):
            trained = sides[index] is ContentSide.TRAIN or relation.near_known(index, ContentSide.TRAIN)
            fates[index] = Fate.TRAINED if trained else Fate.HELD_OUT
        elif side is ContentSide.HELD_OUT:
            fates[index] = Fate.HELD_OUT if sides[index] is None else Fate.LEAKED
        else:
            to_train.append(index)
    held = [index for index in undecided if fates[index] is Fate.HELD_OUT]
    relation.hold_out(held)
    for index in to_train:
        fates[index] = Fate.LEAKED if relation.near_held_out(index) else Fate.TRAIN
    if not any(index < files for index in held):
        rest = [index for index in to_train if fates[index] is Fate.TRAIN]
        already = sum(sides[index] is None for index in held)
        for index in _new_held_out(examples, rest, already, table.keys(), relation, rules.held_out, sides):
            fates[index] = Fate.HELD_OUT
    found = [fate for fate in fates if fate is not None]
    return found[len(valid) :], found[: len(valid)]


def _new_held_out(
    examples: Sequence[Fingerprint],
    rest: Sequence[int],
    already: int,
    decided: Collection[str],
    relation: Relation,
    share: float,
    sides: Sides,
) -> set[int]:
    """Which of the examples that could be trained on are held out instead.

    Args:
        examples: all new examples.
        rest: the numbers of those that could be trained on.
        already: number of other new examples that are held out by their content.
        decided: digests of examples whose side was decided before.
        relation: how the examples resemble each other and the past.
        share: the share to hold out, of those whose content decides.
        sides: the sides of the examples that values decide.
    """

    def eligible(component: Sequence[int]) -> bool:
        return not any(
            sides[index] is not None
            or examples[index].digest in decided
            or relation.near_known(index, ContentSide.TRAIN)
            for index in component
        )

    free = sum(sides[index] is None for index in rest)
    target = held_out_count(free + already, share) - already if free else 0
    components = [component for component in relation.components(rest) if eligible(component)]
    return choose_held_out(components, {index: examples[index].digest for index in rest}, target)


def near_held_out(
    examples: Sequence[Fingerprint], held_out: Sequence[Fingerprint], threshold: float | None
) -> list[bool]:
    """Which examples are equal or near to held-out ones."""
    digests = {each.digest for each in held_out}
    known = Known(held_out, [ContentSide.HELD_OUT] * len(held_out), [True] * len(held_out))
    relation = Relation(examples, range(len(examples)), known, threshold)
    return [each.digest in digests or relation.near_held_out(index) for index, each in enumerate(examples)]


def choose_held_out(components: Iterable[Sequence[int]], keys: Mapping[int, str], target: int) -> set[int]:
    """Chooses whole components with `target` members together, or the smallest one if none is that small.

    Args:
        components: the components that may be held out.
        keys: the digests of all members and of all others that could be trained; not all of them are chosen.
    """
    ordered = sorted((min(keys[index] for index in each), each) for each in components)
    chosen: set[int] = set()
    for _, component in ordered:
        if len(chosen) + len(component) <= target:
            chosen.update(component)
    if not chosen and target > 0 and ordered:
        chosen.update(min(ordered, key=lambda each: (len(each[1]), each[0]))[1])
    return chosen if len(chosen) < len(keys) else set()


def _exact_fates(
    examples: Sequence[Fingerprint],
    table: Mapping[str, tuple[ContentSide, bool]],
    *,
    training: bool,
    validation: Collection[str] = (),
) -> list[Fate | None]:
    """The fates that equality decides; None for the others."""
    fates: list[Fate | None] = []
    seen: set[str] = set()
    for example in examples:
        side, used = table.get(example.digest, (None, False))
        if example.digest in validation or (training and used and side is ContentSide.HELD_OUT):
            fates.append(Fate.LEAKED)
        elif example.digest in seen or (used and (training or side is ContentSide.HELD_OUT)):
            fates.append(Fate.REPEATED)
        elif used:
            fates.append(Fate.TRAINED)
        else:
            fates.append(None)
        seen.add(example.digest)
    return fates
