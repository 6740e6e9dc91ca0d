"""The gate's reasons in words, for the engineer who reads them in the morning. Scores are shown with three decimals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loramill.pipelines.nightly.definition.promotion import GateDefinition
from loramill.pipelines.nightly.gate.candidates import GoldenScore, SliceEvidence
from loramill.plural import counted

#: Less than this is shown as 0.000.
_VISIBLE = 5e-4


def promotion(new: SliceEvidence, old: SliceEvidence | None, policy: GateDefinition) -> str:
    """Why a challenger is promoted."""
    kept = "" if old is None else f"; on {counted(old.examples, 'old one')} it {_change(old)}"
    return gain(new, policy) + kept


def gain(found: SliceEvidence, policy: GateDefinition) -> str:
    """A gain with its interval."""
    kind = "new example" if found.against == "champion" else "held-out example"
    return (
        f"it gains {found.gain:.3f} over the {found.against} on {counted(found.examples, kind)} "
        f"({policy.confidence:.0%} interval {found.low:+.3f} to {found.high:+.3f}, {_probability(found.p_better)})"
    )


def no_gain(found: SliceEvidence, policy: GateDefinition) -> str:
    """Why a gain is not shown."""
    examples = counted(found.examples, "new example" if found.against == "champion" else "held-out example")
    if not found.wins and not found.losses:
        return f"it scores the same as the {found.against} on {examples}"
    if abs(found.gain) < _VISIBLE:
        both = f"better on {found.wins} and worse on {found.losses}"
        return f"it scores the same as the {found.against} on {examples}, {both}"
    if found.gain < 0:
        return f"it {_change(found)} against the {found.against} on {examples}"
    level = 1 - policy.confidence
    least = math.ceil(math.log(level) / math.log(0.5) - 1e-9)
    few = f"; at least {least} held-out examples are needed" if found.examples < least else ""
    return (
        f"its gain of {found.gain:.3f} over the {found.against} may be chance: it is better on {found.wins} and worse "
        f"on {found.losses} of {examples} ({_probability(found.p_better)}, at most {level:.2g} is accepted){few}"
    )


def small_gain(found: SliceEvidence, policy: GateDefinition) -> str:
    """Why a gain that is not due to chance is not enough."""
    gained, least = _distinct(found.gain, policy.min_gain)
    return f"it gains only {gained} over the {found.against}; at least {least} is required"


def harm(found: SliceEvidence, corrected: float, policy: GateDefinition) -> str:
    """A loss on a slice that chance does not explain."""
    lost, limit = _distinct(-found.gain, policy.max_loss)
    return (
        f"it loses {lost} on the slice '{found.name}', worse on {found.losses} and better on {found.wins} of "
        f"{counted(found.examples, 'example')} ({_probability(corrected)}); at most {limit} is allowed"
    )


def observed_loss(old: SliceEvidence, policy: GateDefinition) -> str:
    """A loss on the old examples that may be chance."""
    lost, limit = _distinct(-old.gain, policy.max_loss)
    return f"it loses {lost} on {counted(old.examples, 'old example')}; at most {limit} is allowed"


def possible_loss(old: SliceEvidence, limit: float) -> str:
    """A loss on the old examples that cannot be excluded."""
    possible, allowed = _distinct(-old.bound, limit)
    return (
        f"it may lose up to {possible} on old examples: on {old.examples} of them it {_change(old)}, better on "
        f"{old.wins} and worse on {old.losses}; at most {allowed} is allowed"
    )


def drift(found: SliceEvidence, policy: GateDefinition) -> str:
    """Small losses of several nightly runs that have added up."""
    lost, limit = _distinct(-found.gain, policy.max_loss)
    return f"it loses {lost} on old examples against the version before the champion; at most {limit} is allowed"


def not_better_than_base(base: SliceEvidence) -> str:
    """Why the base could answer as well."""
    examples = counted(base.examples, "held-out example")
    if abs(base.gain) < _VISIBLE:
        return f"it does not beat the base: both score the same on {examples}"
    return f"it does not beat the base: it {_change(base)} against it on {examples}"


def golden(failed: Sequence[GoldenScore], total: int, policy: GateDefinition) -> str:
    """The golden examples that the challenger fails."""
    first = failed[0]
    # Without the answer: reasons are in reports and in messages to webhooks, which contain nothing that tenants wrote.
    return (
        f"it fails {len(failed)} of {counted(total, 'golden example')}; on {first.example[:12]} it scores "
        f"{first.score:.3f}; {policy.min_golden:.0%} must be right"
    )


def _change(found: SliceEvidence) -> str:
    if abs(found.gain) < _VISIBLE:
        return "scores the same"
    return f"gains {found.gain:.3f}" if found.gain > 0 else f"loses {-found.gain:.3f}"


def _probability(p_value: float) -> str:
    return "p < 0.001" if p_value < 1e-3 else f"p = {p_value:.2g}"


def _distinct(value: float, other: float) -> tuple[str, str]:
    """Two numbers with three decimals, or as many as it takes to show that they differ."""
    digits = next((n for n in range(3, 9) if f"{value:.{n}f}" != f"{other:.{n}f}"), 9)
    return f"{value:.{digits}f}", f"{other:.{digits}f}"
