"""Forgetting: how later versions score on what earlier runs held out. Pure functions of scores per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramill.pipelines.nightly.report.schema import SliceHistory, SliceScore


@dataclass(frozen=True, slots=True)
class RunScores:
    """What one run's evaluation of an adapter found.

    Attributes:
        at: when the run started, in seconds since the epoch.
        new: the examples that this run held out of its new data.
        scores: by example, of the version that answered after the run.
    """

    run: str
    at: float
    new: frozenset[str]
    scores: Mapping[str, float]


def slice_histories(runs: Sequence[RunScores]) -> tuple[SliceHistory, ...]:
    """The scores on each run's new examples after that run and after later ones; runs are in order of time.

    A later run counts only if it scored all of these examples: a mean over fewer is another number.
    """
    histories = []
    for position, origin in enumerate(runs):
        later = [each for each in runs[position:] if origin.new and origin.new <= each.scores.keys()]
        if len(later) < 2:  # a single score shows no change
            continue
        scores = tuple(SliceScore(run=each.run, at=each.at, score=_mean(origin, each)) for each in later)
        histories.append(
            SliceHistory(
                run=origin.run,
                at=origin.at,
                examples=len(origin.new),
                scores=scores,
                change=scores[-1].score - scores[0].score,
            )
        )
    return tuple(histories)


def _mean(origin: RunScores, later: RunScores) -> float:
    return sum(later.scores[example] for example in sorted(origin.new)) / len(origin.new)
