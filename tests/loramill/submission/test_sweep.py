"""The candidates of a sweep: the grid, its options, and what is refused before anything is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.submission.defaults import count_training_tokens, resolve_spec
from loramill.submission.options import from_text, read_options
from loramill.submission.request import Hyperparameters, JobRequest, LoramillOptions
from loramill.submission.sweep import candidate_requests, combine
from loramill.types import JobSpec

BASE = Base("tiny", Path(), "b" * 64, "LlamaForCausalLM", 512, "none")


def spec_of(sweep: dict[str, list[Any]], valid: str | None = "file-2", **options: Any) -> JobSpec:
    request = JobRequest(
        AdapterName("acme", "a"), "file-1", valid, options=LoramillOptions.model_validate({"sweep": sweep, **options})
    )
    return combine([resolve_spec(each, BASE, examples=100) for each in candidate_requests(request)])


def test_values_of_several_options_form_a_grid() -> None:
    spec = spec_of({"learning_rate": [1e-4, 1e-3], "rank": [8, 32]}, method="dora", steps=40)
    # The alpha follows from each rank.
    assert spec.candidates == (
        {"rank": 8, "alpha": 16.0, "learning_rate": 1e-4},
        {"rank": 32, "alpha": 64.0, "learning_rate": 1e-4},
        {"rank": 8, "alpha": 16.0, "learning_rate": 1e-3},
        {"rank": 32, "alpha": 64.0, "learning_rate": 1e-3},
    )
    trained = spec.trained_specs
    assert [(each.rank, each.learning_rate, each.method, each.steps) for each in trained[1:3]] == [
        (32, 1e-4, "dora", 40),
        (8, 1e-3, "dora", 40),
    ]
    assert not any(each.candidates for each in trained) and trained[0] == spec.model_copy(update={"candidates": ()})


def test_names_of_methods_become_fields_of_the_spec() -> None:
    spec = spec_of({"method": ["lora", "rslora", "dora"]})
    assert [(each["method"], each["rslora"]) for each in spec.candidates] == [
        ("lora", False),
        ("lora", True),
        ("dora", False),
    ]


def test_a_sweep_costs_the_tokens_that_are_trained() -> None:
    sweep = spec_of({"rank": list(range(1, 9))}, steps=80)
    one = sweep.model_copy(update={"candidates": ()})
    tokens = count_training_tokens(one, [10] * 100, 100)
    assert count_training_tokens(sweep, [10] * 100, 100) == pytest.approx(3 * tokens)


REFUSED: list[tuple[dict[str, list[Any]], dict[str, Any], str]] = [
    ({}, {}, "has no candidates"),
    ({"rank": [8]}, {}, "'rank' has 1 value"),
    ({"rank": []}, {}, "'rank' has no value"),
    ({"rank": [8, 16, 8]}, {}, "'rank' has the value 8 twice"),
    ({"rank": list(range(1, 66))}, {}, "has 65 candidates"),
    ({"rank": [8, 8] * 33}, {}, "has 66 candidates"),  # before equal values are searched, in quadratic time
    ({"rank": list(range(1, 14)), "alpha": [1.0, 2.0, 3.0, 4.0, 5.0]}, {}, "it may have 2 to 64"),
    ({"rnak": [8, 16]}, {}, "did you mean 'rank'"),
    ({"steps": [8, 16]}, {}, "'steps' can't differ"),
    ({"base": ["a", "b"]}, {}, "'base' can't differ"),
    ({"beta": [0.1, 0.2]}, {"objective": "dpo"}, "by the same loss"),
    ({"rank": [8, "many"]}, {}, "'rank': Input should be a valid integer"),
    ({"rank": [8, 999]}, {}, "less than or equal to 256"),
    ({"rank": [8, 16]}, {"rank": 8}, "as an option and in the sweep"),
    ({"method": ["lora", "full"]}, {}, "can't run full fine-tuning"),
    ({"rank": [8, 16]}, {"gpus": 2}, "can't run several GPUs"),
    ({"rank": [8, 16]}, {"executor": "dedicated"}, "share a session"),
    ({"method": ["lora", "qlora"]}, {}, "quantization"),
    ({"rslora": [True, False], "method": ["lora", "rslora"]}, {}, "are the same job"),
]


@pytest.mark.parametrize(("sweep", "options", "message"), REFUSED)
def test_what_can_not_be_swept_is_refused(sweep: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        spec_of(sweep, **options)
    assert message in refused.value.message
    assert refused.value.param is not None and refused.value.param.startswith("loramill.")


def test_a_sweep_needs_validation_data() -> None:
    with pytest.raises(InvalidRequest, match="validation file") as refused:
        spec_of({"rank": [8, 16]}, valid=None)
    assert refused.value.param == "validation_file"


def test_hyperparameters_apply_to_all_candidates() -> None:
    request = JobRequest(
        AdapterName("acme", "a"),
        "file-1",
        "file-2",
        hyperparameters=Hyperparameters(batch_size=4),
        options=LoramillOptions(sweep={"rank": [8, 16]}),
    )
    specs = [resolve_spec(each, BASE, examples=100) for each in candidate_requests(request)]
    assert [each.batch_size for each in specs] == [4, 4]


def test_text_of_the_command_line_becomes_typed_values() -> None:
    text = "learning-rate=1e-4,3e-4; rank=8,32; targets=all-linear,q_proj"
    options = read_options({"sweep": from_text("sweep", text)})
    assert options.to_request()["loramill"]["sweep"] == {
        "learning_rate": [1e-4, 3e-4],
        "rank": [8, 32],
        "targets": [("all-linear",), ("q_proj",)],
    }
    assert from_text("sweep", "lr=1,2; lr=3") == {"learning_rate": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [("rank", "NAME=VALUE"), ("rank=", "NAME=VALUE"), ("ranks=4,8", "did you mean 'rank'"), ("rank=a,b", "rank: ")],
)
def test_text_that_is_no_sweep_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_options({"sweep": text})
