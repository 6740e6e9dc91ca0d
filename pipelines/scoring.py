"""Scores of generated answers against references."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Score:
    """Means over `examples` answers, each 0 to 1.

    Attributes:
        exact_match: the share that is exactly right.
        token_f1: SQuAD's, on words.
        rouge_l: how much of the reference's order of words is kept.
    """

    examples: int
    exact_match: float
    token_f1: float
    rouge_l: float


def score(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Scores answers against their references; surrounding white space doesn't count."""
    pairs = [(answer.strip(), reference.strip()) for answer, reference in zip(answers, references, strict=True)]
    if not pairs:
        return Score(0, 0.0, 0.0, 0.0)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(pairs)

    return Score(
        examples=len(pairs),
        exact_match=mean([answer == reference for answer, reference in pairs]),
        token_f1=mean([token_f1(*pair) for pair in pairs]),
        rouge_l=mean([rouge_l(*pair) for pair in pairs]),
    )


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, counted with their multiplicity."""
    given, wanted = answer.split(), reference.split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F-measure (beta 1) of the longest common subsequence of words (Lin 2004, section 3.1).

    Words are runs of letters and digits in lower case, as the usual `rouge_score` has them, but of any script.
    """
    given, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not given or not wanted:
        return float(answer == reference)
    return 2 * common_subsequence(given, wanted) / (len(given) + len(wanted))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence that is left of both by crossing words out."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, candidate in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def overall(scores: Sequence[Score]) -> Score:
    """The score on all slices together: means weighted by examples."""
    total = sum(part.examples for part in scores)
    if not total:
        return Score(0, 0.0, 0.0, 0.0)

    def mean(name: str) -> float:
        weighted: list[float] = [getattr(part, name) * part.examples for part in scores]
        return sum(weighted) / total

    return Score(total, mean("exact_match"), mean("token_f1"), mean("rouge_l"))
