"""What the gate decides on: the scores of all candidates on the same held-out examples, and its decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from loramill.types import FrozenModel

SliceKind = Literal["old", "new"]


@dataclass(frozen=True, slots=True)
class PairedScores:
    """The scores of all candidates on one example; higher is better. None: there is no such candidate."""

    example: str
    base: float
    challenger: float
    champion: float | None = None
    previous: float | None = None


@dataclass(frozen=True, slots=True)
class PairedSlice:
    """Held-out examples with the scores of all candidates.

    Attributes:
        kind: "new": held out of the new data; "old": of the data that earlier versions were trained on.
    """

    name: str
    kind: SliceKind
    examples: tuple[PairedScores, ...]


@dataclass(frozen=True, slots=True)
class GoldenScore:
    """The challenger's score on an example of the golden set, 1 if the answer is right, and what it answered."""

    example: str
    score: float
    answer: str = ""


class GateVerdict(StrEnum):
    """The gate's answer. Hold: there is too little evidence. Reject: there is evidence of harm."""

    PROMOTE = "promote"
    HOLD = "hold"
    REJECT = "reject"


class SliceEvidence(FrozenModel):
    """What the scores on some examples show about the challenger.

    Attributes:
        against: the candidate that it is compared with.
        gain: the mean difference of their scores.
        low, high: the interval of the gain, of the policy's confidence.
        bound: what the gain is above with this confidence.
        wins, losses: examples on which the challenger scores higher, and lower.
        p_better, p_worse: the probability of at least this gain, or loss, if the two were equally good.
    """

    name: str
    against: str
    examples: int
    gain: float
    low: float
    high: float
    bound: float
    wins: int
    losses: int
    p_better: float
    p_worse: float


class GateDecision(FrozenModel):
    """The decision on a challenger by a metric, its reason in one or two sentences, and the numbers behind it."""

    verdict: GateVerdict
    reason: str
    metric: str | None = None
    evidence: tuple[SliceEvidence, ...] = ()

    @property
    def promote(self) -> bool:
        """Whether the challenger becomes the champion."""
        return self.verdict is GateVerdict.PROMOTE


def distinct(slices: Sequence[PairedSlice], *kinds: SliceKind) -> list[PairedScores]:
    """The examples of all slices of these kinds, each once."""
    return list({each.example: each for part in slices if part.kind in kinds for each in part.examples}.values())
