"""The plan of a job without data or gateway, as a function of its options and the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramill.errors import DoesNotFit, InvalidRequest
from loramill.settings import JobSettings, Settings
from loramill.submission.plan import JobPlan, plan_job, read_plan_file
from loramill.types import ATTENTION_TARGETS


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, cache=tmp_path / "cache", jobs=JobSettings(device_bytes=None))


def plan(settings: Settings, **options: Any) -> JobPlan:
    return plan_job({"base": "8B", "length": 64, **options}, settings)


def test_the_memory_of_a_job_without_a_known_device(settings: Settings) -> None:
    found = plan(settings, micro_tokens="128")
    assert not found.device_known
    assert found.sizing.spec.micro_tokens == 128 and found.sizing.spec.max_length == 64
    assert found.sizing.memory.bytes > 8e9


def test_options_that_were_not_set_are_chosen_for_the_device(settings: Settings) -> None:
    found = plan(settings, gpu="24GB", method="qlora", length=2048)
    assert found.device_known and found.sizing.memory.bytes <= found.sizing.pool.budget_bytes
    shared = plan(settings, gpu="24GB", method="qlora", length=512, per_gpu=2)
    assert shared.sizing.pool.budget_bytes * 2 == found.sizing.pool.budget_bytes


def test_the_base_is_quantized_as_the_options_method_or_settings_require(settings: Settings) -> None:
    def base_bytes(settings: Settings, **options: Any) -> int:
        items = plan(settings, gpu="80GB", **options).sizing.memory.items
        return next(item.bytes for item in items if item.name == "base")

    quantized = base_bytes(settings, quantization="nf4")
    assert quantized < base_bytes(settings) / 2
    assert base_bytes(settings, method="qlora") == quantized
    assert base_bytes(settings.model_copy(update={"quantization": "nf4"})) == quantized


def test_a_plan_says_how_a_quantized_base_is_kept(settings: Settings) -> None:
    def described(**options: Any) -> str:
        items = plan(settings, **options).sizing.memory.items
        return next(item.description for item in items if item.name == "base").partition(" weights")[2]

    assert described() == described(gpu="80GB") == ""
    for quantization in ("int8", "nf4"):
        assert described(quantization=quantization) == "; a CPU keeps the rounded values and the file's"
    assert described(quantization="nf4", gpu="80GB") == " in nf4"
    assert described(quantization="int8", gpu="80GB") == ", rounded to int8 and kept in bfloat16"


def test_an_engine_in_float8_is_not_planned_for_a_quantized_base(settings: Settings) -> None:
    fp8 = settings.model_copy(update={"serve": settings.serve.model_copy(update={"quantization": "fp8"})})
    assert "An engine with 100%" in str(plan(fp8, gpu="80GB").engine)
    assert 'serve.quantization = "fp8" is for a base that is not quantized' in str(
        plan(fp8, gpu="80GB", method="qlora").engine
    )


def mixture(folder: Path) -> str:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "head_dim": 16,
        "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_plan_of_a_mixture_has_the_targets_of_a_job(settings: Settings, tmp_path: Path) -> None:
    assert plan(settings, base=mixture(tmp_path)).sizing.spec.targets == ATTENTION_TARGETS


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"method": "full"}, "loramill.method"),
        ({"targets": ("up_proj",)}, "loramill.targets"),
        ({"quantization": "nf4"}, "quantization"),
        ({"method": "qlora"}, "quantization"),
    ],
)
def test_a_plan_refuses_what_a_mixture_cannot_be_trained_with(
    settings: Settings, tmp_path: Path, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest, match="mixture of experts") as refused:
        plan(settings, base=mixture(tmp_path), **options)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"rnk": 8}, "rnk"),
        ({"method": "magic"}, "method"),
        ({"quantization": "int7"}, "quantization"),
        ({"rank": "many"}, "rank"),
        ({"gpu": "24GB", "cpu": "8GB"}, "gpu"),
    ],
)
def test_an_invalid_option_is_named(settings: Settings, options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan(settings, **options)
    assert refused.value.param == param


def test_a_job_that_does_not_fit_names_the_nearest_that_do(settings: Settings) -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan(settings, base="65B", gpu="48GB", rank=64, quantization="none", length=512)
    assert any("nf4" in each for each in refused.value.nearest)


@pytest.mark.parametrize(("name", "content"), [("job.toml", "rank ="), ("job.json", "[1]"), ("none.toml", None)])
def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidRequest, match=name):
        read_plan_file(tmp_path / name)
