"""Reads the recorded results of steps, of this version and of older ones; what is missing is None. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loramill.pipelines.nightly.evaluation.results import GOLDEN_SLICE
from loramill.pipelines.nightly.report.schema import ReportedGain, ReportedScores
from loramill.types import NightlyStep, StepStatus

CANDIDATES = ("base", "previous", "champion", "challenger")


def results_by_stage(steps: Sequence[NightlyStep], *, done: bool = True) -> dict[str, Mapping[str, Any]]:
    """The results of an adapter's steps by stage, of those that are done or of all."""
    return {step.step: step.result for step in steps if not done or step.status is StepStatus.DONE}


def reported_scores(evaluated: Mapping[str, Any], metric: str) -> tuple[ReportedScores, ...]:
    """The scores of all candidates by slice, from the result of the evaluation."""
    found = []
    for name, roles in _slices(evaluated):
        scores = {role: number(roles[role].get(metric)) for role in CANDIDATES if role in roles}
        examples = max((int(number(each.get("examples")) or 0) for each in roles.values()), default=0)
        if any(score is not None for score in scores.values()):
            found.append(ReportedScores(slice=name, examples=examples, **scores))
    return tuple(found)


def overall_score(slices: Sequence[ReportedScores], candidate: str) -> float | None:
    """A candidate's mean over the examples of all slices.

    A slice of a part, such as `new:topic=tax`, has no other examples than the slice of the whole.
    """
    whole = [each for each in slices if ":" not in each.slice and each.slice != GOLDEN_SLICE]
    known = [(each.examples, getattr(each, candidate)) for each in whole if getattr(each, candidate) is not None]
    total = sum(examples for examples, _ in known)
    return sum(examples * score for examples, score in known) / total if total else None


def reported_gains(decision: Mapping[str, Any]) -> tuple[ReportedGain, ...]:
    """The gate's comparisons, from its result."""
    found = (_gain(each) for each in decision.get("evidence") or ())
    return tuple(each for each in found if each is not None)


def _gain(evidence: Mapping[str, Any]) -> ReportedGain | None:
    gain, low, high = (number(evidence.get(name)) for name in ("gain", "low", "high"))
    if gain is None or low is None or high is None:
        return None
    return ReportedGain(
        slice=str(evidence.get("name", "")),
        against=str(evidence.get("against", "")),
        examples=int(number(evidence.get("examples")) or 0),
        gain=gain,
        low=low,
        high=high,
        wins=evidence.get("wins"),
        losses=evidence.get("losses"),
        p_better=number(evidence.get("p_better")),
        p_worse=number(evidence.get("p_worse")),
    )


def main_gain(gains: Sequence[ReportedGain]) -> ReportedGain | None:
    """The comparison to show first: with the champion on the new examples, or else with the base."""

    def rank(gain: ReportedGain) -> tuple[bool, bool, bool]:
        part = ":" in gain.slice
        return gain.against != "champion", not gain.slice.startswith(("all new", "new")) or part, part

    return min(gains, key=rank, default=None)


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _slices(evaluated: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Mapping[str, Any]]]]:
    """The slices with the scores of each candidate; older runs recorded the slices alone."""
    for name, roles in (evaluated.get("slices") or evaluated).items():
        if isinstance(roles, Mapping) and roles and all(isinstance(each, Mapping) for each in roles.values()):
            yield str(name), roles
