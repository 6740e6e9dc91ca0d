"""The gate: whether a challenger may take the champion's place. A pure function of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramill.pipelines.scoring import Score, overall


@dataclass(frozen=True, slots=True)
class SliceScores:
    """What the three candidates scored on one slice of held-out examples; no champion: a first version."""

    name: str
    base: Score
    champion: Score | None
    challenger: Score


@dataclass(frozen=True, slots=True)
class Thresholds:
    """How much better is better, in token F1 (0 to 1).

    `min_gain`: what the challenger must gain over the champion on all slices together.
    `max_drop`: what it may lose on any one slice (noise of a small held-out set).
    """

    min_gain: float = 0.01
    max_drop: float = 0.05


@dataclass(frozen=True, slots=True)
class Decision:
    """Promote or hold, and why in one sentence."""

    promote: bool
    reason: str


def decide(slices: Sequence[SliceScores], thresholds: Thresholds) -> Decision:
    """Promotes a challenger that gains overall, loses on no slice, and beats the base."""
    if not slices:
        return Decision(False, "there are no held-out examples to judge by")
    challenger = overall([part.challenger for part in slices])
    base = overall([part.base for part in slices])
    if challenger.token_f1 <= base.token_f1:
        return Decision(
            False, f"the challenger ({challenger.token_f1:.3f}) does not beat the base ({base.token_f1:.3f})"
        )
    champions = [part.champion for part in slices if part.champion is not None]
    if len(champions) < len(slices):
        return Decision(True, f"first version, better than the base by {challenger.token_f1 - base.token_f1:.3f}")
    for part, champion in zip(slices, champions, strict=True):
        drop = champion.token_f1 - part.challenger.token_f1
        if drop > thresholds.max_drop:
            return Decision(
                False, f"it loses {drop:.3f} on the slice '{part.name}' (at most {thresholds.max_drop:.3f})"
            )
    gain = challenger.token_f1 - overall(champions).token_f1
    if gain < thresholds.min_gain:
        return Decision(False, f"it gains {gain:+.3f} over the champion (at least {thresholds.min_gain:.3f})")
    return Decision(True, f"it gains {gain:+.3f} over the champion")
