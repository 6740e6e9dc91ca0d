"""A base's anatomy computed from its config, against transformers' own model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loramill.errors import BaseUnusable, InvalidRequest
from loramill.models.catalog import Base
from loramill.sizing import check_targets
from loramill.sizing.anatomy import _transformers_anatomy, anatomy, find_config, linears, read_config
from loramill.sizing.memory import base_weights
from loramill.types import ALL_LINEAR, ATTENTION_TARGETS, JobSpec

from .test_planner import LLAMA_2_70B, LLAMA_3_8B, LLAMA_65B

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
}
MOE = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 24}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 24, "attention_bias": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE),
    "qwen3_moe, some layers dense": ("Qwen3MoeForCausalLM", {**MOE, "mlp_only_layers": [1]}),
    "qwen3, biases": ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
}


def config_of(family: str) -> dict[str, Any]:
    architecture, own = FAMILIES[family]
    return {"architectures": [architecture], "model_type": family.partition(",")[0], **COMMON, **own}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anatomy_equals_that_of_the_model(family: str) -> None:
    config = config_of(family)
    computed, built = anatomy(config), _transformers_anatomy(config, config["architectures"][0])
    assert (computed.linears, computed.embedding_weights, computed.other_weights) == (
        built.linears,
        built.embedding_weights,
        built.other_weights,
    )
    assert (computed.heads, computed.kv_heads, computed.head_dim) == (built.heads, built.kv_heads, built.head_dim)
    assert (computed.hidden, computed.vocabulary) == (48, 101)
    assert computed.intermediate == (48 if family == "qwen3_moe" else 80)


def test_a_mixture_of_experts_has_active_and_idle_weights() -> None:
    found = anatomy(config_of("qwen3_moe"))
    assert found.experts is not None
    weights = 3 * 48 * 24
    assert (found.experts.weights, found.experts.router_weights, found.experts.layers) == (weights, 6 * 48, 3)
    assert found.parameters - found.active_parameters == 3 * 4 * weights
    assert found.experts.idle_weights(0) == 3 * 6 * weights
    assert found.experts.idle_weights(2) == round(3 * 6 * weights * (4 / 6) ** 2)
    assert not any(".mlp." in linear.name for linear in found.linears)
    assert base_weights(found, "none", "cuda").description == "0.000101B weights, 5.94e-05B of them for each token"
    dense = anatomy(config_of("qwen3"))
    assert dense.active_parameters == dense.parameters


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"targets": ("q_proj", "down_proj")}, "loramill.targets"),
        ({"targets": ("mlp.experts.gate_up_proj",)}, "loramill.targets"),
        ({"method": "full"}, "loramill.method"),
    ],
)
def test_a_job_that_would_train_experts_is_refused(tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3_moe")))
    base = Base("moe", tmp_path, "0" * 64, "Qwen3MoeForCausalLM", 256)
    spec = {"base": "0" * 64, "adapter": "a/b", "train": "t", "steps": 2, "batch_size": 1}
    with pytest.raises(InvalidRequest, match="experts") as refused:
        check_targets(JobSpec.model_validate(spec | changes), base)
    assert refused.value.param == param
    for targets in (ATTENTION_TARGETS, (ALL_LINEAR,)):
        check_targets(JobSpec.model_validate(spec | {"targets": targets}), base)


def test_the_built_in_base_has_135m_parameters(base) -> None:
    found = anatomy(read_config(str(base.folder)))
    assert found.parameters == 134_515_008
    assert len(found.linears) == 30 * 7
    assert linears(read_config(str(base.folder / "config.json"))) == found.linears


def test_other_architectures_are_built_by_transformers_without_weights() -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2}
    found = anatomy(config)
    assert {(each.suffix, each.d_in, each.d_out) for each in found.linears} == {
        ("c_attn", 32, 96),
        ("c_proj", 32, 32),
        ("c_fc", 32, 128),
        ("c_proj", 128, 32),
    }
    assert found.embedding_weights == 50257 * 32


SIZES = pytest.mark.parametrize(
    ("size", "published"),
    [("7B", None), ("8B", LLAMA_3_8B), ("65B", LLAMA_65B), ("70b", LLAMA_2_70B), ("135M", None), ("20B", None)],
)


def test_a_published_size_is_the_llama_of_that_size() -> None:
    for size, published in (("8B", LLAMA_3_8B), ("65b", LLAMA_65B)):
        assert anatomy(read_config(size)).linears == anatomy(published).linears
        assert anatomy(read_config(size)).vocabulary == published["vocab_size"]


@SIZES
def test_a_size_is_a_llama_of_about_that_many_parameters(size: str, published: dict[str, object] | None) -> None:
    found = anatomy(read_config(size)).parameters
    expected = float(size[:-1]) * (1e6 if size.endswith("M") else 1e9)
    assert found == pytest.approx(expected, rel=0.12)
    if published is not None:
        assert anatomy(published).parameters == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{", "can't be read"),
        ("[1]", "not contain a JSON object"),
        ('{"architectures": ["LlamaForCausalLM"]}', "hidden_size"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, content: str, fragment: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseUnusable, match=fragment):
        anatomy(read_config(str(tmp_path)))


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(BaseUnusable, match="NoSuchForCausalLM"):
        anatomy({"architectures": ["NoSuchForCausalLM"], "model_type": "no-such"})


def test_an_unknown_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no base 'nothing'"):
        find_config("nothing", tmp_path)


def test_sizing_a_llama_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    code = (
        "import sys; from loramill.sizing import anatomy, fit_spec, read_config;"
        f"anatomy(read_config({str(tmp_path)!r}));"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
