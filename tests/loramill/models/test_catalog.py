"""Bases in local folders, and how they are loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from loramill.errors import BaseUnusable
from loramill.models.catalog import Base, find_base, load_for_training

from .conftest import change


def test_a_local_folder_is_found(folder: Path, tmp_path: Path) -> None:
    base = find_base(str(folder), tmp_path / "cache")
    assert (base.name, base.folder, base.context_length) == ("tiny-model", folder, 256)


def test_the_real_folder_is_the_same_base_by_another_name(base: Base, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(base.folder)
    other = find_base(str(tmp_path / "other"), base.folder.parents[1])
    assert replace(other, name=base.name) == base


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, r"a T5For.* LlamaForCausalLM.* and others of transformers"),
        ({"architectures": None}, "model without architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_configurations_that_cannot_be_served(
    folder: Path, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    change(folder, **keys)
    with pytest.raises(BaseUnusable, match=message):
        find_base(str(folder), tmp_path / "cache")


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 256},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 64},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64},
        {"architectures": ["Qwen3ForCausalLM"]},
        {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 64},
        {"architectures": ["Qwen3MoeForCausalLM"]},
        {"architectures": ["GPT2LMHeadModel"]},
    ],
)
def test_configurations_that_can_be_served(folder: Path, tmp_path: Path, keys: dict[str, object]) -> None:
    change(folder, **keys)
    assert find_base(str(folder), tmp_path / "cache").architecture == keys["architectures"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({"max_position_embeddings": None, "n_positions": 77}, 77),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}, 64),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}}, 32),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 32}}, 256),
    ],
)
def test_contexts_as_each_family_writes_them(
    folder: Path, tmp_path: Path, keys: dict[str, object], tokens: int
) -> None:
    change(folder, **keys)
    assert find_base(str(folder), tmp_path / "cache").context_length == tokens


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"\xff\xfe", "not JSON"),
        ("config.json", b"[]", "not contain a JSON object"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("model.safetensors", None, "no safetensors"),
        ("model.safetensors", b"", "damaged"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0[1, 2, 3", "damaged"),
        ("model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "cut short"),
    ],
)
def test_broken_folders(folder: Path, tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(BaseUnusable, match=message) as caught:
        find_base(str(folder), tmp_path / "cache")
    assert str(folder) in caught.value.message


def test_a_truncated_weight_file_is_seen(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BaseUnusable, match="its size is not what its header says"):
        find_base(str(folder), tmp_path / "cache")


def test_names_without_a_base_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseUnusable, match="There is no base '/nowhere/at/all'"):
        find_base("/nowhere/at/all", tmp_path)
    with pytest.raises(BaseUnusable, match="is a file"):
        find_base(str(folder / "config.json"), tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").chmod(0)
    with pytest.raises(BaseUnusable, match="permissions"):
        find_base(str(folder), tmp_path / "cache")


def test_a_mixture_of_experts_is_not_quantized(folder: Path, tmp_path: Path) -> None:
    change(folder, architectures=["Qwen3MoeForCausalLM"])
    with pytest.raises(BaseUnusable, match="mixture of experts"):
        find_base(str(folder), tmp_path / "cache", "nf4")


def test_a_model_that_does_not_fit_its_configuration(base: Base, folder: Path) -> None:
    with pytest.raises(BaseUnusable, match="can't be loaded"):
        load_for_training(replace(base, folder=folder), torch.float32)


def test_every_dtype_loads_the_same_weights(base: Base) -> None:
    with safe_open(base.folder / "model.safetensors", "pt") as stored:
        name = "model.layers.3.mlp.up_proj.weight"
        weight = load_for_training(base, torch.float32).get_parameter(name)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored.get_tensor(name).float())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_has_equal_values_in_training_and_serving(base, quantization):
    import torch

    from loramill.serve.model import load_decoder

    cache = base.folder.parents[1]
    other = find_base("smollm2-135m", cache, quantization)
    assert other.fingerprint != base.fingerprint
    trained = load_for_training(other, torch.bfloat16)
    served = load_decoder(other.folder, dtype=torch.bfloat16, quantization=other.quantization)
    plain = load_for_training(base, torch.bfloat16)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.29.mlp.down_proj"):
        assert torch.equal(trained.get_submodule(name).weight, served.target_weight(name))
        assert not torch.equal(trained.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert torch.equal(trained.get_output_embeddings().weight, plain.get_output_embeddings().weight)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("packed", [False, True])
def test_transposed_linears_have_equal_values_in_training_and_serving(folder, tmp_path, quantization, packed):
    from transformers import GPT2Config, GPT2LMHeadModel

    from loramill.serve.model import load_model

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=64, n_head=2, vocab_size=64, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    base = find_base(str(folder), tmp_path / "cache", quantization)
    trained = load_for_training(base, torch.float32, packed=packed)
    served = load_model(base.folder, dtype=torch.float32, quantization=quantization)
    plain = load_for_training(replace(base, quantization="none"), torch.float32)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"):
        weight = trained.get_submodule(name).weight
        torch.testing.assert_close(weight.T, served.target_weight(name), rtol=0, atol=0)
        assert not torch.equal(weight, plain.get_submodule(name).weight)
