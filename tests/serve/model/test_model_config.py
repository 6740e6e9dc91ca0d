"""Bases that the decoder refuses, each in one sentence with the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loramill.errors import BaseUnusable
from loramill.models.catalog import NATIVE_ARCHITECTURES
from loramill.serve.model import load_decoder, read_config
from loramill.serve.model.config import ARCHITECTURES

GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN = {"architectures": ["Qwen2ForCausalLM"]}
GEMMA = {"architectures": ["Gemma3ForCausalLM"]}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 16}


def written(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**GOOD, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; the decoder supports Llama"),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({**QWEN, "layer_types": ["sliding_attention"], "sliding_window": 64}, "layer_types.*window of None"),
        ({**QWEN, "layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({**QWEN, "layer_types": []}, "of 1 layers"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"head_dim": 512}, "head_dim 512"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"hidden_size": None}, "missing or malformed"),
        ({**GEMMA, "hidden_activation": "gelu"}, "hidden_activation gelu"),
        ({**GEMMA, "use_bidirectional_attention": True}, "causal"),
        ({**GEMMA, "layer_types": ["chunked_attention"]}, "chunked_attention"),
    ],
)
def test_configs_that_the_decoder_does_not_support_are_refused(tmp_path, changes, message):
    with pytest.raises(BaseUnusable, match=message):
        read_config(written(tmp_path, **changes))


def test_the_architectures_are_those_of_the_catalog():
    assert ARCHITECTURES == NATIVE_ARCHITECTURES


def test_old_and_new_spellings_of_rope_agree(tmp_path):
    old = read_config(written(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})).rope
    new = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    assert old == read_config(written(tmp_path, rope_parameters=new)).rope
    assert (old.theta, old.kind) == (5e5, "linear")


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 64}, (None, None)),
        ({**MISTRAL, "sliding_window": None}, (None, None)),
        (MISTRAL, (4096, 4096)),
        ({**MISTRAL, "sliding_window": 64, "layer_types": ["full_attention"] * 2}, (64, 64)),
        ({**QWEN, "sliding_window": 64, "use_sliding_window": False}, (None, None)),
        ({**QWEN, "sliding_window": 64, "use_sliding_window": True}, (None, None)),
        ({**QWEN, "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (None, 64)),
        ({**QWEN, "use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        (
            {**QWEN, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            (4096, None),
        ),
        ({"architectures": ["Gemma2ForCausalLM"]}, (4096, None)),
        ({**GEMMA, "sliding_window": 64}, (64, 64)),
        ({**GEMMA, "sliding_window": 64, "sliding_window_pattern": 2}, (64, None)),
        ({**GEMMA, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, (None, 64)),
        (MOE, (None, None)),
        ({**MOE, "use_sliding_window": True, "sliding_window": 64}, (64, 64)),
    ],
)
def test_each_layer_has_its_window(tmp_path, changes, windows):
    assert read_config(written(tmp_path, num_hidden_layers=2, **changes)).windows == windows


def test_old_and_new_spellings_of_gemma3_ropes_agree(tmp_path):
    scaled = {"rope_type": "linear", "factor": 8.0}
    old = read_config(written(tmp_path, **GEMMA, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaled))
    assert (old.rope.theta, old.rope.kind, old.rope.factors) == (1e6, "linear", {"factor": 8.0})
    assert old.local_rope is not None and (old.local_rope.theta, old.local_rope.kind) == (1e4, "default")
    new = {"full_attention": {**scaled, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    found = read_config(written(tmp_path, **GEMMA, rope_parameters=new))
    assert (found.rope, found.local_rope) == (old.rope, old.local_rope)
    assert read_config(written(tmp_path, **MOE)).local_rope is None


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, (True,) * 4),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"num_experts": 0}, None),
        ({"decoder_sparse_step": 8}, None),
    ],
)
def test_each_layer_has_experts_or_an_mlp(tmp_path, changes, sparse):
    experts = read_config(written(tmp_path, num_hidden_layers=4, **{**MOE, "num_experts": 6, **changes})).experts
    assert (experts and experts.layers) == sparse


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_malformed_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseUnusable, match=r"config\.json"):
        read_config(tmp_path)


@pytest.fixture
def saved(tmp_path):
    config = {key: value for key, value in GOOD.items() if key != "architectures"}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def test_a_missing_unexpected_or_misshapen_tensor_is_named(saved):
    folder, tensors = saved
    norm = "model.layers.0.input_layernorm.weight"
    broken = [
        ({k: v for k, v in tensors.items() if k != norm}, f"lack '{norm}'"),
        ({**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(2)}, "contain 'model.layers.1.mlp"),
        ({**tensors, norm: torch.zeros(3)}, rf"'{norm}' in .* is \[3\].*should be \[32\]"),
    ]
    for weights, message in broken:
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(BaseUnusable, match=message):
            load_decoder(folder, dtype=torch.float32)


def test_files_missing_or_broken_are_named(saved):
    folder, _ = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseUnusable, match="can't be read"):
        load_decoder(folder, dtype=torch.float32)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(BaseUnusable, match="lacks model-00001-of-00002"):
        load_decoder(folder, dtype=torch.float32)
    index.write_text("{}")
    with pytest.raises(BaseUnusable, match="index"):
        load_decoder(folder, dtype=torch.float32)
