from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loramill.data.examples import Example, read_examples
from loramill.errors import DatasetInvalid
from loramill.pipelines.nightly.evaluation.results import (
    divided,
    example_digest,
    held_out_examples,
    mean_scores,
    pair,
    slice_kind,
)
from loramill.pipelines.nightly.gate.candidates import GoldenScore, PairedScores
from loramill.pipelines.nightly.text_metrics import score_example
from loramill.types import ExampleResult


def example(prompt: str, completion: str = "yes") -> Example:
    row = json.dumps({"prompt": prompt, "completion": completion}).encode()
    return read_examples(row, "one.jsonl").examples[0]


FIRST, SECOND, THIRD = example("one"), example("two"), example("three", "no")
EXAMPLES = {"new": [FIRST, SECOND], "new: en": [SECOND], "before": [THIRD], "golden": [FIRST]}


def results(candidate, version, answer: str) -> list[ExampleResult]:
    """One candidate that always gives the same answer."""
    return [
        ExampleResult(
            example=each.digest,
            candidate=candidate,
            version=version,
            scores=score_example(answer, each.example.completion, ("exact_match",)),
            answer=answer,
            slices=each.slices,
        )
        for each in held_out_examples(EXAMPLES)
    ]


def test_each_example_is_held_out_once_with_all_its_slices() -> None:
    found = held_out_examples(EXAMPLES | {"again": [FIRST, FIRST]})
    assert [each.slices for each in found] == [("new", "golden", "again"), ("new", "new: en"), ("before",)]
    assert [each.digest for each in found] == [example_digest(each) for each in (FIRST, SECOND, THIRD)]


def test_means_are_by_slice_and_candidate() -> None:
    means = mean_scores([*results("challenger", "a" * 64, "yes"), *results("base", None, "?")])
    assert means["new"] == {
        "challenger": {"examples": 2, "exact_match": 1.0},
        "base": {"examples": 2, "exact_match": 0.0},
    }
    assert means["before"]["challenger"] == {"examples": 1, "exact_match": 0.0}


def test_question_and_reference_identify_an_example() -> None:
    assert example_digest(example("one")) == example_digest(FIRST)
    assert len({example_digest(each) for each in (FIRST, SECOND, THIRD, example("one", "no"))}) == 4


def test_candidates_are_paired_by_example_and_slice() -> None:
    all_results = [
        *results("challenger", "a" * 64, "yes"),
        *results("base", None, "?"),
        *results("champion", "b", "no"),
    ]
    slices, golden = pair(all_results, "exact_match")
    assert [(each.name, each.kind, len(each.examples)) for each in slices] == [
        ("new", "new", 2),
        ("new: en", "new", 1),
        ("before", "old", 1),
    ]
    assert slices[0].examples[0] == PairedScores(example_digest(FIRST), base=0.0, challenger=1.0, champion=0.0)
    assert slices[2].examples[0] == PairedScores(example_digest(THIRD), base=0.0, challenger=0.0, champion=1.0)
    assert golden == [GoldenScore(example_digest(FIRST), 1.0, "yes")]


def test_less_loss_is_better() -> None:
    losses = [
        each.model_copy(update={"scores": {"loss": loss, "exact_match": 1.0}})
        for candidate, loss in (("challenger", 0.5), ("base", 2.0))
        for each in results(candidate, None, "yes")
    ]
    (new, *_), _ = pair(losses, "loss")
    assert (new.examples[0].challenger, new.examples[0].base) == (-0.5, -2.0)


@pytest.mark.parametrize(("metric", "right"), [("judge", 0.9), ("token_f1", 1.0), ("exact_match", 1.0)])
def test_the_gates_metric_says_what_a_right_golden_answer_is(metric: str, right: float) -> None:
    scores = {"exact_match": 1.0, "token_f1": 0.5, "judge": 0.9}
    found = [each.model_copy(update={"scores": scores}) for each in results("challenger", "a" * 64, "yes")]
    found += [each.model_copy(update={"scores": scores}) for each in results("base", None, "yes")]
    _, golden = pair(found, metric)
    assert [each.score for each in golden] == [right]


def test_a_field_of_the_metadata_divides_slices_of_enough_examples() -> None:
    topics = ["tax"] * 5 + ["law"] * 4 + [None]
    examples = [
        replace(example(f"prompt {number}"), metadata={} if topic is None else {"topic": topic})
        for number, topic in enumerate(topics)
    ]
    found = divided({"new": examples, "before": examples[:4]}, "topic")
    assert {name: len(each) for name, each in found.items()} == {"new": 10, "new:topic=tax": 5, "before": 4}


def test_a_candidate_without_a_score_is_an_error() -> None:
    own, base = results("challenger", "a" * 64, "yes"), results("base", None, "yes")
    with pytest.raises(DatasetInvalid, match="has no exact_match of the base: evaluate it again"):
        pair([*own, *base[1:]], "exact_match")
    with pytest.raises(DatasetInvalid, match="no judge of the challenger"):
        pair(own, "judge")


def test_slices_of_old_data_are_named_before() -> None:
    kinds = {name: slice_kind(name) for name in ("before", "before: French", "new", "new: French", "beforehand")}
    assert list(kinds.values()) == ["old", "old", "new", "new", "new"]
