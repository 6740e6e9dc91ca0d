"""What of PEFT's format is served, module by module as PEFT computes it, and what is refused with its name."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loramill.errors import AdapterInvalid
from loramill.serve.engine.peft_folder import read_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(adapters, tmp_path):
    return shutil.copytree(adapters["lora"], tmp_path / "adapter")


@pytest.mark.parametrize("name", ["lora", "all", "rslora", "patterns", "dora", "one layer"])
def test_every_module_computes_what_it_does_in_peft(adapters, tiny, tiny_folder, name):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapters[name]).eval()
    tuned = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    deltas = read_adapter(adapters[name], tiny.target_weight)
    assert set(deltas) == set(tuned)
    for path, delta in deltas.items():
        weight = tiny.target_weight(path)
        x = torch.randn(5, weight.shape[1])
        y = x @ weight.T + x @ delta.a.T @ delta.b.T
        with torch.inference_mode():
            expected = tuned[path](x)
        torch.testing.assert_close(y if delta.gain is None else delta.gain * y, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, x @ weight.T, atol=1e-2)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='none'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"r": 5}, r"lora_A .* is \[4, 32\].*need \[5, 32\]"),
        ({"r": 0}, "rank 0"),
        ({"r": None}, "garbles rank or alpha"),
        ({"lora_alpha": "much"}, "garbles rank or alpha"),
        ({"rank_pattern": {"(": 3}}, "garbles rank or alpha"),
        ({"rank_pattern": {"q_proj": 3}}, r"need \[3, 32\]"),
    ],
)
def test_settings_that_cannot_be_served_are_named(folder, tiny, changes, words):
    change_config(folder, **changes)
    with pytest.raises(AdapterInvalid, match=words):
        read_adapter(folder, tiny.target_weight)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.clear(), "no weights"),
        (rename(f"{Q}.lora_A.weight", "base_model.model.lm_head.lora_A.weight"), r"'lm_head'.*can't adapt|needs"),
        (rename(f"{Q}.lora_A.weight", f"{Q}.lora_embedding_A"), "lora_embedding_A"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"has \['lora_A.weight'\]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(31, 4)}), r"lora_B .* is \[31, 4\]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(32, 4, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}), "magnitude"),
        (lambda t: t.update({Q.replace("layers.0", "layers.7") + ".lora_A.weight": torch.zeros(4, 32)}), "layers.7"),
    ],
)
def test_weights_that_cannot_be_served_are_named(folder, tiny, change, words):
    change_weights(folder, change)
    with pytest.raises(AdapterInvalid, match=words):
        read_adapter(folder, tiny.target_weight)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_and_broken_files_are_named(folder, tiny, file, damage):
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterInvalid, match=file.split(".")[0]):
        read_adapter(folder, tiny.target_weight)


def test_nothing_is_ever_unpickled(folder, tiny):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match="safetensors"):
        read_adapter(folder, tiny.target_weight)


def test_lower_precision_and_weights_that_are_no_numbers_are_read(folder, tiny):
    def halve(tensors):
        tensors.update({name: tensor.bfloat16() * float("nan") for name, tensor in tensors.items()})

    change_weights(folder, halve)
    deltas = read_adapter(folder, tiny.target_weight)
    assert all(delta.a.dtype == torch.float32 and delta.a.isnan().all() for delta in deltas.values())
