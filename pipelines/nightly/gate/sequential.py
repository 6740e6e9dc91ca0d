"""Whether a decision is certain before all examples are evaluated. A pure function.

The gate is monotone in the challenger's scores, so its decision lies between those for the worst and the best outcome
of the examples that are left. If neither is "promote", or both are, the rest cannot change that. The decision is then
that of all examples, and so is the rate of false promotions, whatever the size and the number of the chunks. Alpha
spending would stop sooner for a clear gain, but it makes the test after each chunk stricter, which costs power every
night, and all old examples are needed to show that none of them suffered.

The new examples come first: a challenger that shows no gain on them needs no old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loramill.pipelines.nightly.definition.promotion import GateDefinition
from loramill.pipelines.nightly.gate.candidates import (
    GateDecision,
    GoldenScore,
    PairedScores,
    PairedSlice,
    SliceKind,
    distinct,
)
from loramill.pipelines.nightly.gate.policy import decide


@dataclass(frozen=True, slots=True)
class PendingSlice:
    """Examples of a slice that are not evaluated yet."""

    name: str
    kind: SliceKind
    examples: tuple[str, ...]


def decide_early(
    slices: Sequence[PairedSlice],
    pending: Sequence[PendingSlice],
    golden: Sequence[GoldenScore] = (),
    pending_golden: Sequence[str] = (),
    policy: GateDefinition | None = None,
) -> GateDecision | None:
    """Decides on a challenger if the examples that are left cannot change whether it is promoted; else returns None.

    Args:
        slices: what is evaluated, with scores from 0 to 1.
        pending: what is not. A slice may be in both.
        golden, pending_golden: likewise.
        policy: default: the default policy.
    """
    policy = policy or GateDefinition()
    known = distinct(slices, "old", "new")
    left = {example for part in pending for example in part.examples} - {each.example for each in known}
    if not left and not pending_golden:
        return decide(slices, golden, policy)
    if not known:
        return None
    best, worst = (
        decide(
            _filled(slices, pending, known[0], won=won),
            [*golden, *(GoldenScore(each, float(won)) for each in pending_golden)],
            policy,
        )
        for won in (True, False)
    )
    if best.promote and not worst.promote:
        return None
    certain, counted = (worst, "lost") if worst.promote else (best, "won")
    rest = f"{len(left)} of {len(known) + len(left)} examples that were not evaluated"
    return GateDecision(verdict=certain.verdict, reason=f"even with the {rest} counted as {counted}, {certain.reason}")


def _filled(
    slices: Sequence[PairedSlice], pending: Sequence[PendingSlice], like: PairedScores, *, won: bool
) -> list[PairedSlice]:
    """The slices as if the challenger had won, or lost, all pending examples against every candidate."""
    others = 0.0 if won else 1.0
    fill = PairedScores(
        example="",
        base=others,
        challenger=1.0 - others,
        champion=None if like.champion is None else others,
        previous=None if like.previous is None else others,
    )
    evaluated = {part.name: part for part in slices}
    scored = {each.example: each for part in slices for each in part.examples}
    for part in pending:
        before = evaluated.get(part.name, PairedSlice(part.name, part.kind, ()))
        rest = tuple(scored.get(each) or replace(fill, example=each) for each in part.examples)
        evaluated[part.name] = replace(before, examples=before.examples + rest)
    return list(evaluated.values())
