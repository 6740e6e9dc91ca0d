"""Scores of generated answers against references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """Means over `examples` answers: the share that is exactly right, and token F1 (SQuAD's, on words)."""

    examples: int
    exact_match: float
    token_f1: float


def score(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Scores answers against their references; surrounding white space doesn't count."""
    pairs = [(answer.strip(), reference.strip()) for answer, reference in zip(answers, references, strict=True)]
    if not pairs:
        return Score(0, 0.0, 0.0)
    exact = sum(answer == reference for answer, reference in pairs)
    return Score(len(pairs), exact / len(pairs), sum(token_f1(*pair) for pair in pairs) / len(pairs))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, counted with their multiplicity."""
    given, wanted = answer.split(), reference.split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def overall(scores: Sequence[Score]) -> Score:
    """The score on all slices together: means weighted by examples."""
    total = sum(part.examples for part in scores)
    if not total:
        return Score(0, 0.0, 0.0)
    exact = sum(part.exact_match * part.examples for part in scores)
    return Score(total, exact / total, sum(part.token_f1 * part.examples for part in scores) / total)
