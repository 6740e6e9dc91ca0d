"""The gate: whether a challenger replaces the champion. A pure function of the scores of all candidates per example.

A challenger is promoted if all of this holds:

- It answers `min_golden` of the golden examples right.
- It is better on the new examples, with `confidence`, and by at least `min_gain`. The examples of all new slices are
  tested together: one test needs no correction, and slices by a field of the data may have a few examples each.
- On the old examples together it is not inferior: their mean loss is within `max_loss`, and so is the bound that the
  loss is below with this confidence.
- No slice, old or new, shows a loss. There are many slices, so their p-values are corrected by Holm's method; a weak
  sign (`SUSPICION`) is enough to hold, since a wrong hold costs one nightly run.
- Against the version before the champion it does not lose more than `max_loss` either, so that small losses of several
  nightly runs do not add up.
- It is better than the base; a first version, which has no champion to beat, with this confidence.

Small sets: five examples are the fewest that can show a gain at 95% (2^-5 = 0.03), with five wins and no loss. Ten old
examples cannot exclude a loss of 5 points. There, the bound may be as far off as chance puts it if the two candidates
are equally good and differ on `CHURN` of the examples; the observed mean loss must still be within `max_loss`. So one
answer lost of 32 old ones does not hold a challenger, and two do. From about 160 examples on, only `max_loss` counts.

The decision is monotone: a higher score of the challenger never turns "promote" into "hold" or "hold" into "reject".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

from loramill.pipelines.nightly.definition.promotion import GateDefinition
from loramill.pipelines.nightly.gate import reasons
from loramill.pipelines.nightly.gate.candidates import (
    GateDecision,
    GateVerdict,
    GoldenScore,
    PairedScores,
    PairedSlice,
    SliceEvidence,
    SliceKind,
    distinct,
)
from loramill.pipelines.nightly.gate.statistics import (
    bootstrap_means,
    holm,
    interval,
    lower_bound,
    randomization_test,
)

#: The corrected p-value of a loss on a slice that holds a challenger; to reject it, 1 - confidence is needed.
SUSPICION = 0.2
#: An assumption: the share of examples on which two equally good versions differ. Champions and challengers that
#: continued from them differed on 0.07 (CLINC150, travel; `loramill-bench nightly`). Twice that leaves room: at the
#: share itself, the bound holds half of the equally good versions.
CHURN = 0.15
#: Rounding error of a mean.
_ROUNDING = 1e-9

_HOLD, _REJECT, _PROMOTE = GateVerdict.HOLD, GateVerdict.REJECT, GateVerdict.PROMOTE
_Finding = tuple[GateVerdict, str]


def decide(
    slices: Sequence[PairedSlice], golden: Sequence[GoldenScore] = (), policy: GateDefinition | None = None
) -> GateDecision:
    """Decides on a challenger.

    Args:
        slices: all held-out examples; either all of them or none have a champion.
        golden: the examples of the golden set.
        policy: default: the default policy.
    """
    policy = policy or GateDefinition()
    everything = distinct(slices, "old", "new")
    if not everything:
        return GateDecision(verdict=_HOLD, reason="there are no held-out examples to evaluate on")
    base = compare("all examples", "base", everything, policy)
    if any(each.champion is None for each in everything):
        findings = [_golden(golden, policy), _base_of_first(base, policy)]
        promote = f"first version, and {reasons.gain(base, policy)}"
        return _decision(findings, promote, [base])
    evidence = {part.name: compare(part.name, "champion", part.examples, policy) for part in slices if part.examples}
    old, new = (_together(slices, kind, evidence, policy) for kind in ("old", "new"))
    evidence |= {each.name: each for each in (old, new) if each is not None}
    findings = [
        _golden(golden, policy),
        *_harm(list(evidence.values()), policy),
        _inferior(old, policy),
        _drift(distinct(slices, "old"), policy),
        _base(base, policy),
        _gain(new, policy),
    ]
    promote = reasons.promotion(new, old, policy) if new else ""
    return _decision(findings, promote, [*evidence.values(), base])


def compare(name: str, against: str, examples: Sequence[PairedScores], policy: GateDefinition) -> SliceEvidence:
    """What these examples show about the challenger against another candidate, which all of them must have."""
    differences = [each.challenger - getattr(each, against) for each in examples]
    means = bootstrap_means(differences)
    low, high = interval(means, policy.confidence)
    return SliceEvidence(
        name=name,
        against=against,
        examples=len(examples),
        gain=sum(sorted(differences)) / len(differences),
        low=low,
        high=high,
        bound=lower_bound(means, policy.confidence),
        wins=sum(each > 0 for each in differences),
        losses=sum(each < 0 for each in differences),
        p_better=randomization_test(differences),
        p_worse=randomization_test([-each for each in differences]),
    )


def _decision(findings: Sequence[_Finding | None], promote: str, evidence: Sequence[SliceEvidence]) -> GateDecision:
    """The first finding that rejects, or else the first that holds."""
    found = [each for each in findings if each is not None]
    verdict, reason = next(
        (each for wanted in (_REJECT, _HOLD) for each in found if each[0] is wanted), (_PROMOTE, promote)
    )
    return GateDecision(verdict=verdict, reason=reason, evidence=tuple(evidence))


def _together(
    slices: Sequence[PairedSlice], kind: SliceKind, evidence: Mapping[str, SliceEvidence], policy: GateDefinition
) -> SliceEvidence | None:
    """The comparison with the champion on all examples of a kind; that of a slice if it has all of them."""
    parts = [part for part in slices if part.kind == kind and part.examples]
    if not parts:
        return None
    every = distinct(parts, kind)
    largest = max(parts, key=lambda part: len(part.examples))
    if len(largest.examples) == len(every):
        return evidence[largest.name]
    return compare(f"all {kind} examples", "champion", every, policy)


def _golden(golden: Sequence[GoldenScore], policy: GateDefinition) -> _Finding | None:
    failed = [each for each in golden if each.score < 1 - _ROUNDING]
    if len(golden) - len(failed) >= policy.min_golden * len(golden) - _ROUNDING:
        return None
    return _REJECT, reasons.golden(failed, len(golden), policy)


def _harm(evidence: Sequence[SliceEvidence], policy: GateDefinition) -> list[_Finding]:
    """Slices on which the challenger loses more than `max_loss`, and not by chance; the largest loss first."""
    corrected = holm({each.name: each.p_worse for each in evidence})
    lost = [each for each in evidence if each.gain < -policy.max_loss - _ROUNDING]
    return [
        (
            _REJECT if corrected[each.name] <= 1 - policy.confidence + _ROUNDING else _HOLD,
            reasons.harm(each, corrected[each.name], policy),
        )
        for each in sorted(lost, key=lambda each: each.gain)
        if corrected[each.name] <= SUSPICION
    ]


def _inferior(old: SliceEvidence | None, policy: GateDefinition) -> _Finding | None:
    """Whether a loss on the old examples cannot be excluded."""
    if old is None:
        return None
    if old.gain < -policy.max_loss - _ROUNDING:
        return _HOLD, reasons.observed_loss(old, policy)
    chance = NormalDist().inv_cdf(policy.confidence) * (CHURN / old.examples) ** 0.5
    limit = max(policy.max_loss, chance)
    if old.bound < -limit - _ROUNDING:
        return _HOLD, reasons.possible_loss(old, limit)
    return None


def _drift(old: Sequence[PairedScores], policy: GateDefinition) -> _Finding | None:
    """Whether the losses of several nightly runs have added up."""
    known = [each for each in old if each.previous is not None]
    if not known:
        return None
    drift = compare("old examples", "previous", known, policy)
    if drift.gain < -policy.max_loss - _ROUNDING and drift.p_worse <= 1 - policy.confidence:
        return _HOLD, reasons.drift(drift, policy)
    return None


def _base(base: SliceEvidence, policy: GateDefinition) -> _Finding | None:
    if base.gain > _ROUNDING:
        return None
    verdict = _REJECT if base.p_worse <= 1 - policy.confidence + _ROUNDING else _HOLD
    return verdict, reasons.not_better_than_base(base)


def _base_of_first(base: SliceEvidence, policy: GateDefinition) -> _Finding | None:
    return _base(base, policy) or _gain(base, policy)


def _gain(new: SliceEvidence | None, policy: GateDefinition) -> _Finding | None:
    """Why these examples do not show a gain."""
    if new is None:
        return _HOLD, "there are no new held-out examples, on which it could be better"
    if new.gain <= _ROUNDING or new.p_better > 1 - policy.confidence + _ROUNDING:
        return _HOLD, reasons.no_gain(new, policy)
    if new.gain < policy.min_gain - _ROUNDING:
        return _HOLD, reasons.small_gain(new, policy)
    return None
