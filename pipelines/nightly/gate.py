"""The gate: whether a challenger replaces the champion. A pure function of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramill.pipelines.nightly.scoring import Score, overall

#: Rounding error of the difference of two means.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class SliceScores:
    """The scores of the three candidates on one slice of held-out examples; None without a champion."""

    name: str
    base: Score
    champion: Score | None
    challenger: Score


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds in token F1 (0 to 1).

    Attributes:
        min_gain: what the challenger must gain over the champion on all slices together.
        max_drop: what it may lose on any one slice (noise of a small held-out set).
    """

    min_gain: float = 0.01
    max_drop: float = 0.05


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether to promote the challenger, and the reason in one sentence."""

    promote: bool
    reason: str


def decide(slices: Sequence[SliceScores], thresholds: Thresholds) -> GateDecision:
    """Promotes a challenger that gains overall, loses on no slice, and beats the base."""
    if not slices:
        return GateDecision(False, "there are no held-out examples to evaluate on")
    challenger = overall([part.challenger for part in slices])
    base = overall([part.base for part in slices])
    if challenger.token_f1 <= base.token_f1:
        return GateDecision(
            False, f"the challenger ({challenger.token_f1:.3f}) does not beat the base ({base.token_f1:.3f})"
        )
    champions = [part.champion for part in slices if part.champion is not None]
    if len(champions) < len(slices):
        return GateDecision(True, f"first version, better than the base by {challenger.token_f1 - base.token_f1:.3f}")
    for part, champion in zip(slices, champions, strict=True):
        drop = champion.token_f1 - part.challenger.token_f1
        if drop > thresholds.max_drop:
            lost, limit = _distinct(drop, thresholds.max_drop)
            return GateDecision(False, f"it loses {lost} on the slice '{part.name}'; at most {limit} is allowed")
    gain = challenger.token_f1 - overall(champions).token_f1
    if gain < thresholds.min_gain - _ROUNDING:
        return GateDecision(
            False, f"{_describe_gain(gain, thresholds.min_gain)}; at least +{thresholds.min_gain:.3f} is required"
        )
    return GateDecision(True, f"it gains {gain:.3f} over the champion")


def _describe_gain(gain: float, minimum: float) -> str:
    """Describes a gain that is too small."""
    if abs(gain) < _ROUNDING:
        return "it scores the same as the champion"
    if gain < 0:
        return f"it loses {_distinct(-gain, 0)[0]} against the champion"
    return f"it gains only {_distinct(gain, minimum)[0]} over the champion"


def _distinct(value: float, other: float) -> tuple[str, str]:
    """Two numbers with three decimals, or as many as it takes to show that they differ."""
    digits = next((n for n in range(3, 9) if f"{value:.{n}f}" != f"{other:.{n}f}"), 9)
    return f"{value:.{digits}f}", f"{other:.{digits}f}"
