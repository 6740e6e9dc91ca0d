"""Which examples are near-duplicates: candidates by MinHash and locality-sensitive hashing, each pair then verified.

Two examples are near-duplicates if they share at least a share `threshold` of their trigrams, both with and without the
trigrams that many of the adapter's examples have. Without this second condition, all examples that fill one long
template would count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rensa import RMinHash, RMinHashLSH

from loramill.pipelines.nightly.collection.fingerprint import SKETCH_SIZE, Sketch

#: A trigram is common if this share of the examples has it, and at least this number of them.
COMMON_SHARE = 0.2
COMMON_EXAMPLES = 10
#: With fewer specific trigrams, an example counts as a whole: copies that are edited here and there have trigrams in
#: common too, and differ in three per wrong letter.
LEAST_SPECIFIC = 8
#: Examples in which trigrams are counted; more change little.
COUNTED_EXAMPLES = 2000

_PERMUTATIONS, _SEED = 128, 17
#: Greatest probability that the hashing misses a pair whose similarity is the threshold.
_MISS = 1e-6


@dataclass(frozen=True, slots=True)
class Trigrams:
    """The trigrams of one example.

    Attributes:
        all: its sketch.
        specific: those that are not common.
        limit: the sketch lacks hashes above this one; None: it is complete.
        minhash: of the specific trigrams, or of all if too few are specific: candidates are found by it.
    """

    all: Sketch
    specific: Sketch
    limit: int | None
    minhash: RMinHash


def are_near(a: Trigrams, b: Trigrams, threshold: float) -> bool:
    """Whether two examples are near-duplicates."""
    limit = min((each.limit for each in (a, b) if each.limit is not None), default=None)
    if _jaccard(a.all, b.all, limit) < threshold:
        return False
    if max(len(a.specific), len(b.specific)) < LEAST_SPECIFIC:
        return True
    return _jaccard(a.specific, b.specific, limit) >= threshold


def describe(sketches: Sequence[Sketch], common: Sketch) -> list[Trigrams]:
    """Sketches with their specific trigrams."""
    if not sketches:
        return []
    lengths = np.array([len(each) for each in sketches])
    flat = np.concatenate(sketches)
    kept = ~np.isin(flat, common)
    ends = np.cumsum(lengths)[:-1]
    specific = [each[keep] for each, keep in zip(sketches, np.split(kept, ends), strict=True)]
    hashed = [part if len(part) >= LEAST_SPECIFIC else each for each, part in zip(sketches, specific, strict=True)]
    return [
        Trigrams(each, part, int(each[-1]) if len(each) == SKETCH_SIZE else None, minhash)
        for each, part, minhash in zip(sketches, specific, _minhashes(hashed), strict=True)
    ]


def common_trigrams(sketches: Sequence[Sketch]) -> Sketch:
    """The sorted hashes of the trigrams that are common among examples.

    Of a long example only the smallest hashes are known, so a hash is counted among the examples that would have it.
    """
    if len(sketches) < COMMON_EXAMPLES:
        return np.empty(0, np.uint32)
    hashes, counts = np.unique(np.concatenate(sketches), return_counts=True)
    complete = np.iinfo(np.uint32).max
    limits = np.sort([each[-1] if len(each) == SKETCH_SIZE else complete for each in sketches])
    known_in = len(limits) - np.searchsorted(limits, hashes)
    common: Sketch = hashes[(counts >= COMMON_EXAMPLES) & (counts >= COMMON_SHARE * known_in)]
    return common


class SimilarityIndex:
    """Finds the near-duplicates of an example among those added before.

    Args:
        threshold: the least Jaccard similarity of near-duplicates, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._lsh = RMinHashLSH(threshold, _PERMUTATIONS, _bands(threshold))
        self._added: list[Trigrams] = []

    def add(self, examples: Sequence[Trigrams]) -> None:
        """Adds examples, numbered from 0 in the order of addition."""
        if examples:
            self._lsh.insert_many([each.minhash for each in examples], len(self._added))
            self._added += examples

    def near(self, example: Trigrams, skip: Callable[[int], bool] = lambda number: False) -> Iterator[int]:
        """The numbers of an example's near-duplicates, verified one by one as they are taken.

        Args:
            example: the example.
            skip: whether an added example is left out, called before its verification.
        """
        if self._added:
            for number in sorted(self._lsh.query(example.minhash)):
                if not skip(number) and are_near(example, self._added[number], self._threshold):
                    yield number


def _minhashes(sketches: Sequence[Sketch]) -> list[RMinHash]:
    """The MinHashes of sketches, computed together."""

    def tokens(sketch: Sketch) -> list[bytes]:
        raw = sketch.tobytes()
        return [raw[i : i + 4] for i in range(0, len(raw), 4)]

    found: list[RMinHash] = RMinHash.from_token_sets([tokens(each) for each in sketches], _PERMUTATIONS, _SEED)
    return found


def _bands(threshold: float) -> int:
    """The fewest bands, of the most rows each, that miss a pair at the threshold with a probability of `_MISS`."""
    for rows in (16, 8, 4, 2):
        bands = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= _MISS:
            return bands
    return _PERMUTATIONS


def _jaccard(a: Sketch, b: Sketch, limit: int | None) -> float:
    if limit is not None:
        a, b = (each[: np.searchsorted(each, limit, side="right")] for each in (a, b))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0
