"""How "auto" is resolved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.submission.defaults import (
    MAX_STEPS,
    MIN_STEPS,
    PREFERENCE_LEARNING_RATE,
    count_steps,
    count_training_tokens,
    openai_hyperparameters,
    resolve_spec,
)
from loramill.submission.request import Hyperparameters, JobRequest, LoramillOptions
from loramill.types import ATTENTION_TARGETS, JobSpec


def resolve(
    examples: int = 160,
    hyperparameters: dict[str, Any] | None = None,
    context: int = 2048,
    **options: Any,
) -> JobSpec:
    request = JobRequest(
        adapter=AdapterName("acme", "support"),
        train="file-1",
        hyperparameters=Hyperparameters(**(hyperparameters or {})),
        options=LoramillOptions(**options),
    )
    return resolve_spec(request, base(context), examples)


def base(context: int = 2048) -> Base:
    return Base("tiny", Path(), "f" * 64, "LlamaForCausalLM", context)


@pytest.mark.parametrize(
    ("objective", "rate"), [("dpo", PREFERENCE_LEARNING_RATE), ("orpo", 1e-3), ("kto", PREFERENCE_LEARNING_RATE)]
)
def test_preferences_are_trained_at_a_lower_learning_rate(objective: str, rate: float) -> None:
    spec = resolve(hyperparameters={"learning_rate_multiplier": 3.0}, objective=objective)
    assert (spec.objective, spec.learning_rate) == (objective, 3 * rate)
    assert openai_hyperparameters(spec, 160)["learning_rate_multiplier"] == 3.0
    assert resolve(objective=objective, max_length=100).max_example_tokens == (100 if objective == "kto" else 200)


def test_on_a_mixture_of_experts_a_job_adapts_attention_unless_it_has_targets() -> None:
    mixture = replace(base(), architecture="Qwen3MoeForCausalLM")
    for targets, expected in ((None, ATTENTION_TARGETS), (["q_proj"], ("q_proj",))):
        request = JobRequest(
            adapter=AdapterName("acme", "support"), train="file-1", options=LoramillOptions(targets=targets)
        )
        assert resolve_spec(request, mixture, 160).targets == expected


def test_without_options_a_spec_has_the_defaults() -> None:
    spec = resolve()
    assert spec == JobSpec(
        base="f" * 64, adapter="acme/support", train="file-1", steps=60, epochs=3, batch_size=8, checkpoint_every=15
    )


@pytest.mark.parametrize(
    ("examples", "batch_size", "steps"),
    [
        (1, 1, 30),
        (10, 2, 30),
        (40, 8, 30),
        (80, 8, 30),
        (160, 8, 60),
        (161, 8, 63),
        (2400, 8, 300),
        (9999, 19, 527),  # more than 300, but no example is left out
        (10**7, 256, 39063),
    ],
)
def test_auto_values_follow_the_number_of_examples(examples: int, batch_size: int, steps: int) -> None:
    spec = resolve(examples)
    assert (spec.batch_size, spec.steps) == (batch_size, steps)


@pytest.mark.parametrize(
    ("hyperparameters", "options", "field", "value"),
    [
        ({"n_epochs": 1}, {}, "steps", 20),
        ({"n_epochs": 1, "batch_size": 7}, {}, "steps", 23),
        ({"batch_size": 80}, {}, "steps", 30),
        ({}, {"steps": 1000}, "checkpoint_every", 100),
        ({"n_epochs": 9}, {"steps": 5}, "steps", 5),
        ({"n_epochs": 9}, {"steps": 5}, "epochs", None),
        ({"n_epochs": 2}, {}, "epochs", 2),
        ({"n_epochs": 1, "batch_size": 500}, {}, "steps", 1),
        ({}, {"rank": 4}, "alpha", 8.0),
        ({}, {"rank": 64, "rslora": True}, "alpha", 128.0),
        ({}, {"rank": 4, "alpha": 32.0}, "alpha", 32.0),
        ({}, {"rank": 4, "rank_pattern": {"q_proj": 2}}, "alpha_pattern", {"q_proj": 4.0}),
        ({}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1.0}}, "alpha_pattern", {"v_proj": 1.0}),
        ({}, {"rank_pattern": {"q_proj": 2}, "alpha": 32.0}, "alpha_pattern", {}),
        ({"learning_rate_multiplier": 0.5}, {}, "learning_rate", 5e-4),
        ({"learning_rate_multiplier": 0.5}, {"learning_rate": 3e-4}, "learning_rate", 3e-4),
        ({"learning_rate_multiplier": 0.5}, {"method": "full"}, "learning_rate", 5e-5),
        ({}, {"rank": 4}, "rank", 4),
        ({}, {"targets": ("q_proj",)}, "targets", ("q_proj",)),
        ({}, {"max_length": 2048}, "max_length", 2048),
        ({}, {"start_from": "champion"}, "start_from", None),
    ],
)
def test_given_options_override_the_defaults(
    hyperparameters: dict[str, Any], options: dict[str, Any], field: str, value: object
) -> None:
    assert getattr(resolve(hyperparameters=hyperparameters, **options), field) == value


def test_start_from_is_the_version_that_was_looked_up() -> None:
    request = JobRequest(AdapterName("a", "b"), "t", options=LoramillOptions(start_from="champion"))
    spec = resolve_spec(request, base(), 9, start_from="v")
    assert spec.start_from == "v"


@pytest.mark.parametrize("method", ["dora", "adalora", "full"])
def test_a_job_that_continues_a_version_has_its_adapter_by_default(method: str) -> None:
    first = resolve(method=method, rank=4, alpha=12, rslora=method == "dora", targets="q_proj", layers="0-1")
    request = JobRequest(AdapterName("a", "b"), "t", options=LoramillOptions(start_from="champion"))
    spec = resolve_spec(request, base(), 160, "v", first)
    assert spec.method == ("lora" if method == "full" else method)
    for field in ("rank", "rslora", "targets", "layers"):
        assert getattr(spec, field) == getattr(first, field)
    assert spec.alpha == (4 if method == "full" else 12)
    assert spec.learning_rate == 1e-3

    same = JobRequest(AdapterName("a", "b"), "t", options=LoramillOptions(start_from="champion", rank=4))
    assert resolve_spec(same, base(), 160, "v", first) == spec


@pytest.mark.parametrize(("option", "value"), [("rank", 32), ("alpha", 8.0), ("rslora", True), ("method", "rslora")])
def test_a_job_cannot_continue_a_version_of_another_rank_or_scale(option: str, value: object) -> None:
    options = LoramillOptions.model_validate({"start_from": "champion", option: value})
    request = JobRequest(AdapterName("a", "b"), "t", options=options)
    with pytest.raises(InvalidRequest, match="but the version to continue from has") as caught:
        resolve_spec(request, base(), 160, "v", resolve(rank=4, alpha=12))
    assert caught.value.param == f"loramill.{'rslora' if option == 'method' else option}"


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 48), (True, 24)])
def test_adalora_continues_with_another_rank_at_the_same_scale(rslora: bool, alpha: float) -> None:
    request = JobRequest(AdapterName("a", "b"), "t", options=LoramillOptions(start_from="champion", rank=16))
    spec = resolve_spec(request, base(), 160, "v", resolve(method="adalora", rank=4, alpha=12, rslora=rslora))
    assert (spec.rank, spec.alpha) == (16, alpha)


def test_a_small_context_bounds_the_examples() -> None:
    assert resolve(context=256).max_length == 256
    with pytest.raises(InvalidRequest, match="256") as caught:
        resolve(context=256, max_length=257)
    assert caught.value.param == "loramill.max_length"


@pytest.mark.parametrize(
    ("hyperparameters", "options", "param"),
    [
        ({"n_epochs": 0}, {}, "hyperparameters.n_epochs"),
        ({"n_epochs": 10**400}, {}, "hyperparameters.n_epochs"),
        ({"batch_size": 0}, {}, "hyperparameters.batch_size"),
        ({"batch_size": -3}, {}, "hyperparameters.batch_size"),
        ({"learning_rate_multiplier": 0.0}, {}, "hyperparameters.learning_rate_multiplier"),
        ({}, {"rank": 0}, "loramill.rank"),
        ({}, {"rank": 10**400}, "loramill.rank"),
        ({}, {"steps": 0}, "loramill.steps"),
        ({}, {"dropout": 1.0}, "loramill.dropout"),
        ({}, {"targets": ()}, "loramill.targets"),
        ({}, {"init_rank": 12}, "loramill.init_rank"),
        ({}, {"method": "dora", "init_rank": 12}, "loramill.init_rank"),
    ],
)
def test_an_option_out_of_range_is_named(hyperparameters: dict[str, Any], options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(hyperparameters=hyperparameters, **options)
    assert caught.value.param == param and param in caught.value.message


@given(st.integers(1, 10**7))
def test_auto_values_always_make_a_valid_spec(examples: int) -> None:
    spec = resolve(examples)
    assert spec.epochs is not None and spec.steps == count_steps(spec.epochs, examples, spec.batch_size)
    assert spec.steps >= MIN_STEPS
    assert spec.steps <= MAX_STEPS or spec.epochs == 1
    assert 1 <= spec.batch_size <= examples


@given(st.integers(1, 50), st.integers(1, 64), st.integers(1, 5000))
def test_openai_hyperparameters_are_reported_as_submitted(epochs: int, batch_size: int, examples: int) -> None:
    spec = resolve(examples, {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": 0.3})
    reported = openai_hyperparameters(spec, examples)
    assert reported == {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": 0.3}
    assert openai_hyperparameters(spec, None) == reported
    assert count_training_tokens(spec, [10] * examples, examples) == 10 * examples * epochs


@pytest.mark.parametrize(("examples", "epochs"), [(10, 4), (11, None), (80, None), (None, None)])
def test_steps_are_reported_as_epochs_if_they_are_whole_epochs(examples: int | None, epochs: int | None) -> None:
    spec = resolve(hyperparameters={"batch_size": 8}, steps=5)
    assert openai_hyperparameters(spec, examples)["n_epochs"] == epochs
