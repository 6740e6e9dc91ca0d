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
#: Metrics by which an answer is right if its score is 1; by the others, it is right if it equals the reference.
_RIGHT_BY = ("json_valid", "scorer", "judge")
#: Fewer examples cannot show a loss with 95% confidence: 2^-5 = 0.03.
LEAST_OF_A_SLICE = 5
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


def divided(slices: Mapping[str, Sequence[Example]], field: str) -> dict[str, Sequence[Example]]:
    """The slices, with a further one for each value of a field of the metadata, such as `new:topic=tax`.

    Values with fewer than `LEAST_OF_A_SLICE` examples get none.
    """
    found: dict[str, Sequence[Example]] = {}
    for name, examples in slices.items():
        found[name] = examples
        parts: dict[str, list[Example]] = {}
        for example in examples:
            if field in example.metadata:
                parts.setdefault(f"{name}:{field}={example.metadata[field]}", []).append(example)
        found |= {part: each for part, each in sorted(parts.items()) if len(each) >= LEAST_OF_A_SLICE}
    return found


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
    metrics = [metric for metric in results[0].scores if all(metric in each.scores for each in results)]
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
        for name in challenger.slices:
            if name == GOLDEN_SLICE:
                right = _score(digest, challenger, "challenger", golden_metric(metric))
                golden.append(GoldenScore(digest, right, challenger.answer))
            else:
                slices.setdefault(name, []).append(PairedScores(digest, **scores))
    return [PairedSlice(name, slice_kind(name), tuple(each)) for name, each in slices.items()], golden


def golden_metric(metric: str) -> str:
    """The score that makes the answer to a golden example right, if `metric` is the gate's."""
    return metric if metric in _RIGHT_BY else "exact_match"


def slice_kind(name: str) -> SliceKind:
    """Whether a slice has old examples or new ones, by its name."""
    return "old" if name.partition(":")[0] == OLD_SLICE else "new"


def _score(digest: str, result: ExampleResult | None, candidate: Candidate, metric: str) -> float:
    if result is None or metric not in result.scores:
        raise DatasetInvalid(f"The example {digest[:12]} has no {metric} of the {candidate}: evaluate it again.")
    return -result.scores[metric] if metric in LOWER_IS_BETTER else result.scores[metric]
