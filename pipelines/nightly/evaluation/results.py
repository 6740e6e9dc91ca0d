"""The results of a nightly run per example: their means, and how the gate compares them.

Slices whose name begins with `before` are old; `golden` has the examples that must be answered right; the rest are new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramill.data.examples import Example
from loramill.errors import DatasetInvalid
from loramill.pipelines.nightly.gate.candidates import GoldenScore, PairedScores, PairedSlice, SliceKind
from loramill.types import Candidate, ExampleResult

OLD_SLICE, NEW_SLICE, GOLDEN_SLICE = "before", "new", "golden"
#: What makes the answer to a golden example right, where it is computed; else the gate's own metric does.
GOLDEN_METRIC = "exact_match"
#: Metrics of which less is better; the gate compares their negatives.
LOWER_IS_BETTER = ("loss",)


def example_digest(example: Example) -> str:
    """A hash of what is asked and what is expected; a repeated example has the same one."""
    content = [example.messages[:-1], example.prompt, example.completion, example.tools]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class HeldOutExample:
    """An example with its digest and the slices that contain it."""

    digest: str
    example: Example
    slices: tuple[str, ...]


def held_out_examples(slices: Mapping[str, Sequence[Example]]) -> list[HeldOutExample]:
    """The examples of all slices, each once."""
    found: dict[str, tuple[Example, list[str]]] = {}
    for name, examples in slices.items():
        for example in examples:
            _, names = found.setdefault(example_digest(example), (example, []))
            if name not in names:
                names.append(name)
    return [HeldOutExample(digest, example, tuple(names)) for digest, (example, names) in found.items()]


def mean_scores(results: Sequence[ExampleResult]) -> dict[str, dict[Candidate, dict[str, float]]]:
    """The mean of each score by slice and candidate, with the number of examples as `examples`."""
    found: dict[str, dict[Candidate, list[ExampleResult]]] = {}
    for each in results:
        for name in each.slices:
            found.setdefault(name, {}).setdefault(each.candidate, []).append(each)
    return {
        name: {candidate: _means(each) for candidate, each in by_candidate.items()}
        for name, by_candidate in found.items()
    }


def _means(results: Sequence[ExampleResult]) -> dict[str, float]:
    metrics = results[0].scores
    means = {metric: sum(each.scores[metric] for each in results) / len(results) for metric in metrics}
    return {"examples": len(results)} | means


def pair(results: Sequence[ExampleResult], metric: str) -> tuple[list[PairedSlice], list[GoldenScore]]:
    """The scores of all candidates on each example, as the gate's input.

    Raises:
        DatasetInvalid: an example has no result, or no such score, of a candidate that has others.
    """
    candidates = {each.candidate: each.version for each in results}
    by_example: dict[str, dict[Candidate, ExampleResult]] = {}
    for each in results:
        by_example.setdefault(each.example, {})[each.candidate] = each
    slices: dict[str, list[PairedScores]] = {}
    golden: list[GoldenScore] = []
    for digest, of_example in by_example.items():
        scores = {candidate: _score(digest, of_example.get(candidate), candidate, metric) for candidate in candidates}
        challenger = of_example["challenger"]
        golden_score = challenger.scores.get(GOLDEN_METRIC, scores["challenger"])
        for name in challenger.slices:
            if name == GOLDEN_SLICE:
                golden.append(GoldenScore(digest, golden_score, challenger.answer))
            else:
                slices.setdefault(name, []).append(PairedScores(digest, **scores))
    return [PairedSlice(name, slice_kind(name), tuple(each)) for name, each in slices.items()], golden


def slice_kind(name: str) -> SliceKind:
    """Whether a slice has old examples or new ones, by its name."""
    return "old" if name.partition(":")[0] == OLD_SLICE else "new"


def _score(digest: str, result: ExampleResult | None, candidate: Candidate, metric: str) -> float:
    if result is None or metric not in result.scores:
        raise DatasetInvalid(f"The example {digest[:12]} has no {metric} of the {candidate}: evaluate it again.")
    return -result.scores[metric] if metric in LOWER_IS_BETTER else result.scores[metric]
