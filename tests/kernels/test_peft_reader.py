"""Adapters as PEFT and others save them, read strictly: complete and as PEFT computes them, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from loramill.errors import AdapterInvalid
from loramill.kernels.peft_folder import BaseModules, read_adapter

from ..llama import tiny_llama

Tensors = dict[str, torch.Tensor]
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def llama() -> PreTrainedModel:
    """Twelve layers, to distinguish 1, 10 and 11."""
    return tiny_llama(num_hidden_layers=12, initializer_range=0.2)


@cache
def base() -> BaseModules:
    model = llama()
    return BaseModules.of_model(model, model.get_output_embeddings())


@contextmanager
def saved(model: PreTrainedModel | None = None, **config: Any) -> Iterator[Path]:
    """A folder that PEFT saved, in which no matrix is zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    torch.manual_seed(3)
    adapted = get_peft_model(model or llama(), LoraConfig(**options | config))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    with TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        yield Path(folder)


def change(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> None:
    tensors = load_file(folder / FILE)
    found = edit(tensors)
    save_file(tensors if found is None else found, folder / FILE)


def rename(new: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new(name): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(40)[None] * 2).logits
    return found


@torch.no_grad()
def with_adapter(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """The base's logits with the adapter's deltas added to its weights; a tied embedding is copied first."""
    for name, delta in read_adapter(folder, BaseModules.of_model(model, model.get_output_embeddings())).items():
        module = model.get_submodule(name)
        change = delta.scale * delta.b.float() @ delta.a.float()
        turned = delta.lookup or type(module).__name__ == "Conv1D"
        weight = module.weight.detach() + (change.T if turned else change)
        if delta.gain is not None:
            weight = weight * (delta.gain if turned else delta.gain[:, None])
        module.weight = torch.nn.Parameter(weight)
    return logits(model)


def assert_as_in_peft(folder: Path, renamed: Path | None = None, make: Callable[[], PreTrainedModel] = llama) -> None:
    """`renamed`, as read here, computes what PEFT computes from `folder`."""
    expected = logits(PeftModel.from_pretrained(make(), folder).eval())
    assert not torch.allclose(expected, logits(make()), atol=1e-2)
    torch.testing.assert_close(with_adapter(make(), renamed or folder), expected, rtol=1e-3, atol=1e-3)


KINDS: dict[str, dict[str, Any]] = {
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"^model\.layers\.1[01]\.mlp\.down_proj": 8, "v_proj": 3},
        "alpha_pattern": {r".*\.1\.self_attn\.(q|v)_proj": 32, "down_proj": 4},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 10},
    "regex": {"target_modules": r".*layers\.(0|1|11)\.(self_attn|mlp)\.(q|k|o|gate|up)_proj"},
    "full name": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.11.mlp.up_proj"]},
    "all-linear except": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "excluded names": {"exclude_modules": ["layers.3.self_attn.q_proj", "v_proj"]},
    "dora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "head and layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [2]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_targets_the_same_modules_as_in_peft(kind: str) -> None:
    with saved(**KINDS[kind]) as folder:
        assert_as_in_peft(folder)
        names = [name for name in load_file(folder / FILE) if "lora_" in name]
        for name in (min(names), max(names)):
            with TemporaryDirectory() as other:
                copy = shutil.copytree(folder, other, dirs_exist_ok=True)
                change(Path(copy), lambda tensors, name=name: (tensors.pop(name), None)[1])
                with pytest.raises(AdapterInvalid, match=f"lacks '{name}'"):
                    read_adapter(Path(copy), base())


def test_all_linear_by_its_name_leaves_the_head_out() -> None:
    with saved(target_modules="all-linear") as folder:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear"}))
        assert len(read_adapter(folder, base())) == 12 * 7


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2s_transposed_linears_are_read(dora: bool) -> None:
    def make() -> PreTrainedModel:
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=101)).eval()

    with saved(make(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, use_dora=dora) as folder:
        assert_as_in_peft(folder, make=make)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("ensure", [False, True])
def test_adapters_of_tied_embeddings_act_where_they_do_in_peft(targets: list[str], ensure: bool) -> None:
    def make() -> PreTrainedModel:
        return tiny_llama(initializer_range=0.2, tie_word_embeddings=True)

    with saved(make(), target_modules=["q_proj", *targets], ensure_weight_tying=ensure) as folder:
        assert_as_in_peft(folder, make=make)


def _dropped(name: str) -> str:
    return name.removeprefix(PREFIX)


#: How other programs change the names of tensors that PEFT writes.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another name": lambda name: name.replace(".weight", ".my_run.weight"),
    "no prefix": _dropped,
    "inner model": lambda name: _dropped(name).removeprefix("model."),
    "prefix of a tower": lambda name: name.replace(PREFIX + "model.", PREFIX + "language_model.model."),
    "prefix of a newer tower": lambda name: name.replace(PREFIX + "model.", PREFIX + "model.language_model."),
    "GPT's prefix": lambda name: name.replace(PREFIX + "model.", PREFIX + "transformer."),
    "prefix twice": lambda name: PREFIX + name,
    "compiled": lambda name: name.replace(PREFIX, PREFIX + "_orig_mod."),
    "FSDP": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "DDP": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_names_of_tensors_are_understood(spelling: str, tmp_path: Path) -> None:
    with saved(**KINDS["patterns"]) as folder:
        renamed = Path(shutil.copytree(folder, tmp_path / "renamed"))
        change(renamed, rename(SPELLINGS[spelling]))
        assert set(load_file(renamed / FILE)).isdisjoint(load_file(folder / FILE)) or spelling == "FSDP"
        assert_as_in_peft(folder, renamed)


def test_patterns_match_the_names_of_the_trained_model(tmp_path: Path) -> None:
    with saved(target_modules=["q_proj"]) as folder:
        change(folder, rename(SPELLINGS["prefix of a tower"]))
        config = json.loads((folder / "adapter_config.json").read_text())
        towered = {"target_modules": r"language_model\.model\.layers\.\d+\.self_attn\.q_proj", "r": 9}
        ranks = {"rank_pattern": {r"^language_model\..*": 4}}
        (folder / "adapter_config.json").write_text(json.dumps(config | towered | ranks))
        assert len(read_adapter(folder, base())) == 12
        change(folder, lambda t: {name: tensor for name, tensor in t.items() if "layers.7." not in name})
        with pytest.raises(AdapterInvalid, match=r"layers.7.self_attn.q_proj.lora_A"):
            read_adapter(folder, base())


Q7 = f"{PREFIX}model.layers.7.self_attn.q_proj"


def only_the_first_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "layers.0." in name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (only_the_first_layer, rf"lacks '{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight'.* holds none"),
        (lambda t: (t.pop(f"{Q7}.lora_B.weight"), None)[1], rf"lacks '{Q7}.lora_B.weight'.* holds lora_A"),
        (rename(lambda name: name.replace("A.", "A.one.").replace("B.", "B.two.")), r"several adapters \(one, two\)"),
        (lambda t: t.update({f"{Q7}.lora_A.default.weight": torch.ones(4, 32)}), "the same part of"),
        (lambda t: t.update({f"{Q7[17:]}.lora_A.weight": torch.ones(4, 32)}), "the same part of"),
        (lambda t: t.update({f"{Q7}.lora_C.weight": torch.ones(4, 32)}), "lora_C.weight', which is not part"),
        (lambda t: t.update({f"{Q7}.lora_B.bias": torch.ones(32)}), "lora_B.bias', which is not part"),
        (
            lambda t: t.update({f"{Q7.replace('.7.', '.12.')}.lora_A.weight": torch.ones(4, 32)}),
            "no module 'model.layers.12",
        ),
        (
            lambda t: t.update({f"{Q7.replace('q_', 'k_')}.lora_A.weight": torch.ones(4, 32)}),
            "doesn't target 'model.layers.7",
        ),
        (lambda t: t.update({f"{Q7}.lora_magnitude_vector": torch.ones(32)}), "has only lora_A, lora_B"),
        (rename(lambda name: name.replace(PREFIX + "model", PREFIX + "visual")), "no module 'visual.layers"),
        (lambda t: {name: torch.zeros(0) for name in t}, r"is \[0\].*ZeRO-3"),
        (lambda t: {name: tensor.double() for name, tensor in t.items()}, "is F64; save it in one of F32"),
    ],
)
def test_missing_and_unexpected_tensors_are_named(edit: Callable[[Tensors], Tensors | None], message: str) -> None:
    with saved() as folder:
        change(folder, edit)
        with pytest.raises(AdapterInvalid, match=message):
            read_adapter(folder, base())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*target_modules"),
        ({"use_newly_invented": True}, "use_newly_invented"),
        ({"newly_invented_config": {"x": 1}}, "newly_invented_config"),
        ({"lora_alpha": float("inf")}, "alpha inf"),
        ({"peft_type": "LOHA"}, "'LOHA'.*LORA and ADALORA"),
        ({"peft_type": None, "fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "MLX-LM's format"),
    ],
)
def test_configs_that_are_not_supported_are_refused(config: dict[str, Any], message: str) -> None:
    with saved() as folder:
        known = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(known | config))
        with pytest.raises(AdapterInvalid, match=message):
            read_adapter(folder, base())


def test_other_formats_are_refused_with_how_to_convert_them(tmp_path: Path) -> None:
    with saved() as folder:
        inner = shutil.copytree(folder, tmp_path / "outer" / "default")
        with pytest.raises(AdapterInvalid, match="its folder default has one"):
            read_adapter(Path(inner).parent, base())
        for name, message in (
            ("adapter_model.bin", r"a pickle.*weights_only=True"),
            ("adapters.safetensors", "MLX-LM"),
            ("adapter_model.safetensors.index.json", "shards"),
        ):
            (folder / FILE).rename(folder / name)
            with pytest.raises(AdapterInvalid, match=message):
                read_adapter(folder, base())
            (folder / name).rename(folder / FILE)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@settings(max_examples=12)
@given(
    targets=st.sets(st.sampled_from([*LINEARS, "lm_head"]), min_size=1),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1, 5.3, 16, -4]),
    rslora=st.booleans(),
    dora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(LINEARS), st.integers(1, 5), max_size=2),
    layers=st.none() | st.lists(st.integers(0, 3), min_size=1, unique=True),
    spelling=st.sampled_from([str, *SPELLINGS.values()]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_adapter_is_read_as_peft_reads_it(
    targets: set[str],
    rank: int,
    alpha: float,
    rslora: bool,
    dora: bool,
    ranks: dict[str, int],
    layers: list[int] | None,
    spelling: Callable[[str], str],
    dtype: torch.dtype,
) -> None:
    if targets == {"lm_head"}:
        layers = None  # PEFT refuses it: the head is in no layer

    def make() -> PreTrainedModel:
        return tiny_llama(num_hidden_layers=4, initializer_range=0.2)

    config = {"target_modules": targets, "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "use_dora": dora}
    with saved(make(), **config, rank_pattern=ranks, layers_to_transform=layers) as folder:
        change(
            folder, lambda t: {name: tensor if "base_layer" in name else tensor.to(dtype) for name, tensor in t.items()}
        )
        expected = logits(PeftModel.from_pretrained(make(), folder).eval())
        change(folder, rename(lambda name: name if "base_layer" in name else spelling(name)))
        torch.testing.assert_close(with_adapter(make(), folder), expected, rtol=2e-3, atol=2e-3)
