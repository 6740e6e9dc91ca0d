"""How new examples resemble each other and the adapter's past: equality is decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, Sketch
from loramill.pipelines.nightly.collection.similarity import (
    COUNTED_EXAMPLES,
    SimilarityIndex,
    Trigrams,
    common_trigrams,
    describe,
)
from loramill.types import ContentSide


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known about an adapter's content: examples whose side was decided before.

    Attributes:
        examples: their fingerprints.
        sides: their sides.
        used: whether a run used them; false if its data was released, so that another run may.
    """

    examples: Sequence[Fingerprint] = ()
    sides: Sequence[ContentSide] = ()
    used: Sequence[bool] = ()


class Components:
    """Connected components of numbers below `count`, by union and find."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def join(self, a: int, b: int) -> None:
        """Joins the components of two numbers."""
        self._parent[self._root(a)] = self._root(b)

    def joined(self, a: int, b: int) -> bool:
        """Whether two numbers are in one component."""
        return self._root(a) == self._root(b)

    def members(self) -> list[list[int]]:
        """The components."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._parent)):
            found.setdefault(self._root(number), []).append(number)
        return list(found.values())

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number


class Relation:
    """The near-duplicates among new examples whose fate is open, and between them and the known ones.

    Args:
        examples: the new examples.
        open_indices: those of them whose fate is open.
        known: the adapter's past.
        threshold: least similarity of near-duplicates; None: only equal texts are duplicates.
    """

    def __init__(
        self, examples: Sequence[Fingerprint], open_indices: Sequence[int], known: Known, threshold: float | None
    ) -> None:
        self._threshold = threshold
        new = [examples[index].sketch for index in open_indices]
        own = {examples[index].digest for index in open_indices}
        past = [
            (each.sketch, side)
            for each, side in zip(known.examples, known.sides, strict=True)
            if len(each.sketch) and each.digest not in own
        ]
        self._common = common_trigrams([*new, *(sketch for sketch, _ in past[:COUNTED_EXAMPLES])])
        self._trigrams = dict(zip(open_indices, describe(new, self._common), strict=True))
        relevant = _resembling([sketch for sketch, _ in past], new, threshold)
        self._known = {
            side: self._near_any(
                self._trigrams,
                describe(
                    [sketch for (sketch, each), keep in zip(past, relevant, strict=True) if keep and each is side],
                    self._common,
                ),
            )
            for side in ContentSide
        }
        self._held: set[int] = set()

    def near_known(self, index: int, side: ContentSide) -> bool:
        """Whether a known example of this side resembles a new one."""
        return index in self._known[side]

    def hold_out(self, indices: Sequence[int]) -> None:
        """Declares new examples held out."""
        others = {index: each for index, each in self._trigrams.items() if index not in set(indices)}
        self._held = self._near_any(others, [self._trigrams[index] for index in indices])

    def near_held_out(self, index: int) -> bool:
        """Whether a held-out example, known or new, resembles a new one."""
        return index in self._held or index in self._known[ContentSide.HELD_OUT]

    def components(self, indices: Sequence[int]) -> list[list[int]]:
        """The connected components of these examples under the relation."""
        if self._threshold is None:
            return [[index] for index in indices]
        index = SimilarityIndex(self._threshold)
        components = Components(len(indices))
        for position, own in enumerate(indices):
            for other in index.near(self._trigrams[own], skip=partial(components.joined, position)):
                components.join(position, other)
            index.add([self._trigrams[own]])
        return [[indices[position] for position in each] for each in components.members()]

    def _near_any(self, examples: Mapping[int, Trigrams], others: Sequence[Trigrams]) -> set[int]:
        if self._threshold is None:
            return set()
        index = SimilarityIndex(self._threshold)
        index.add(others)
        return {number for number, each in examples.items() if next(index.near(each), None) is not None}


def _resembling(past: Sequence[Sketch], new: Sequence[Sketch], threshold: float | None) -> Sequence[bool]:
    """Which known examples share enough trigrams with the new ones together to be near one of them.

    A near-duplicate shares at least the share `threshold` of its trigrams; half of that leaves room for sketches of
    which hashes are missing. This leaves out most of thousands of known examples before they are hashed.
    """
    if threshold is None or not past or not new:
        return [False] * len(past)
    flat = np.concatenate(past)
    found = np.isin(flat, np.unique(np.concatenate(new)))
    starts = np.concatenate([[0], np.cumsum([len(each) for each in past])[:-1]])
    shares = np.add.reduceat(found, starts, dtype=np.float64) / [len(each) for each in past]
    return list(shares >= threshold / 2)
