"""Tests of a definition in words."""

from __future__ import annotations

from typing import Any

import pytest

from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.definition.describe import describe


def lines(definition: dict[str, Any], topic: str) -> list[str]:
    found = describe(NightlyDefinition.model_validate(definition), ["acme/a"], [])
    return [text for name, text in found if name == topic]


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ({}, "token_f1, with a confidence of 95%: a gain on new data, and a loss of at most 0.05 on old"),
        ({"min_gain": 0.02}, "token_f1, with a confidence of 95%: a gain of at least 0.02 on new data, and a loss of "),
        ({"max_loss": 0}, "token_f1, with a confidence of 95%: a gain on new data, and no loss on old"),
    ],
)
def test_the_gate_is_described_by_what_it_requires(gate: dict[str, Any], text: str) -> None:
    (found,) = lines({"gate": gate}, "gate")
    assert found.startswith(text)


def test_an_override_names_its_sections_and_its_adapters() -> None:
    overrides = [
        {"adapters": "acme/a", "gate": {"max_loss": 0.1}, "train": {"start": "both"}},
        {"adapters": ["b/*", "c/*"], "watch": {"window": "2h"}},
    ]
    assert lines({"overrides": overrides}, "override") == ["train and gate for acme/a", "watch for b/* and c/*"]


@pytest.mark.parametrize(
    ("feedback", "text"),
    [
        ({}, "corrections become examples; ratings and corrections become preferences (at least 20 pairs)"),
        ({"ratings": False}, "corrections become examples"),
        ({"corrections": False, "min_pairs": 1}, "ratings and corrections become preferences (at least 1 pair)"),
        ({"corrections": False, "ratings": False}, "not used"),
    ],
)
def test_feedback_is_described_by_what_becomes_of_it(feedback: dict[str, Any], text: str) -> None:
    assert lines({"feedback": feedback}, "feedback") == [text]


@pytest.mark.parametrize(
    ("replay", "text"),
    [
        (
            {},
            "64 old examples; 10% of the training data is old prompts with the champion's own answers "
            "(token F1 of at least 0.7)",
        ),
        ({"plain_examples": 1, "on_policy": 0}, "1 old example"),
    ],
)
def test_replay_is_described_with_both_kinds_of_examples(replay: dict[str, Any], text: str) -> None:
    assert lines({"replay": replay}, "replay") == [text]
