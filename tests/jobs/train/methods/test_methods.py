"""Every method over a grid of specs: PEFT and the engine compute from the stored files what was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from loramill.errors import AdapterInvalid, InvalidRequest
from loramill.jobs.train.methods import adapter_files, attach_adapter, load_start_adapter
from loramill.jobs.train.methods.peft_folder import lora_config
from loramill.kernels.peft_folder import GAINS_FILE, BaseModules, read_adapter
from loramill.kernels.quantization import Quantization
from loramill.models.catalog import Base
from loramill.types import JobSpec

from .method_training import (
    load_model,
    logits_by_peft,
    logits_of,
    loss_of,
    spec_of,
    store_adapter,
    tokens,
    train_steps,
    trained_model,
)

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "nf4")
METHODS = ("lora", "dora", "adalora", "pissa", "loftq")
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "layers": {"layers": (0, 2), "targets": ("q_proj", "down_proj")},
    "all-linear": {"targets": ("all-linear",), "layers": (1,)},
    "patterns": {"rank_pattern": {"k_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"mlp.up_proj": 1.5}},
    "rslora patterns": {"rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 1.5}},
}


def combined(method: str, shape: str) -> JobSpec:
    changes = dict(SHAPES[shape])
    if method == "adalora":
        changes.pop("rank_pattern", None)
    return spec_of(method=method, **changes)


@torch.no_grad()
def by_engine(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """The logits of the normal form that the engine reads, in fp32."""
    for module, delta in read_adapter(folder, BaseModules.of_model(model, model.get_output_embeddings())).items():
        linear = model.get_submodule(module)
        merged = linear.weight + delta.scale * delta.b.float() @ delta.a.float()
        linear.weight = torch.nn.Parameter(merged if delta.gain is None else delta.gain[:, None] * merged)
    return logits_of(model)


#: Every method with every shape, every method with every kind of base, and every shape with every kind of base.
GRID = [
    (method, shape, kinds[(i + j) % len(kinds)])
    for i, method in enumerate(METHODS)
    for kinds in [QUANTIZATIONS[1:] if method == "loftq" else QUANTIZATIONS]
    for j, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize(("method", "shape", "quantization"), GRID)
def test_the_stored_adapter_equals_the_trained_model(
    small: Base,
    exported: Callable[..., tuple[Path, torch.Tensor]],
    method: str,
    shape: str,
    quantization: Quantization,
) -> None:
    folder, expected = exported(combined(method, shape), quantization)
    assert not torch.allclose(expected, logits_of(load_model(small, quantization)), atol=1e-2)
    torch.testing.assert_close(logits_by_peft(load_model(small, quantization), folder), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_engine(load_model(small, quantization), folder), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_unchanged_afterwards(small: Base, method: str, dtype: torch.dtype) -> None:
    model = load_model(small, "nf4", dtype)
    model.lm_head.weight.requires_grad_(True)
    before = str(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits_of(model)
    drawn, modules = torch.random.get_rng_state(), dict(model.named_modules())
    with (
        pytest.raises(KeyboardInterrupt),
        attach_adapter(model, spec_of(method=method, dropout=0.5), small.folder) as adapted,
    ):
        assert all(weight.dtype == torch.float32 for weight in adapted.weights.values())
        assert all(weight.requires_grad for weight in adapted.weights.values())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        train_steps(adapted, spec_of(dropout=0.5), steps=2)
        raise KeyboardInterrupt
    assert str(model) == before[0] and dict(model.named_modules()) == modules
    assert not any("forward" in vars(module) for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model), before[2]) and torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_unchanged_after_a_refusal(small: Base, method: str) -> None:
    model = load_model(small, "int8")
    before = str(model)
    with pytest.raises(InvalidRequest), attach_adapter(model, spec_of(method=method, targets=("nope",)), small.folder):
        pass
    assert str(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_layers_depend_on_the_seed_alone(small: Base, method: str) -> None:
    model = load_model(small, "nf4")

    def run(seed: int, steps: int) -> list[torch.Tensor]:
        torch.rand(3)
        spec = spec_of(method=method, seed=seed, dropout=0.3)
        with attach_adapter(model, spec, small.folder) as adapted:
            train_steps(adapted, spec, steps)
            return [weight.detach().clone() for weight in adapted.weights.values()]

    trained, initial = run(1, steps=3), run(1, steps=0)
    assert all(map(torch.equal, run(1, steps=3), trained))
    assert all(map(torch.equal, run(1, steps=0), initial))
    assert not all(map(torch.equal, run(2, steps=3), trained))
    if method in ("lora", "dora", "adalora"):
        assert not all(map(torch.equal, run(2, steps=0), initial))


def test_initial_factors_have_the_distribution_of_peft(small: Base) -> None:
    with attach_adapter(load_model(small), spec_of(rank=64), small.folder) as adapted:
        for name, weight in adapted.weights.items():
            bound = 1 / math.sqrt(weight.shape[1])
            if "lora_A" in name:
                assert 0.999 * bound < weight.abs().max().item() <= bound
                assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            else:
                assert not weight.any()


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_base(small: Base, method: str) -> None:
    """All but LoftQ's first logits are the base's; LoftQ's are nearer to those of the base before quantization."""
    model = load_model(small, "nf4")
    base = logits_of(model)
    with attach_adapter(model, spec_of(method=method, rank=16), small.folder) as adapted:
        first = logits_of(adapted.model)
    if method == "loftq":
        original = logits_of(load_model(small))
        assert (first - original).norm() < 0.8 * (base - original).norm()
    else:
        torch.testing.assert_close(first, base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_job_starts_from_a_stored_adapter(small: Base, tmp_path: Path, method: str) -> None:
    spec, model = spec_of(method=method, rank=8, init_rank=12), load_model(small, "nf4")
    with trained_model(model, spec, small.folder) as adapted:
        folder, expected = store_adapter(adapted, spec, tmp_path / "first"), logits_of(adapted.model)
    again = spec.model_copy(update={"seed": 5})
    with attach_adapter(model, again, small.folder) as adapted:
        load_start_adapter(adapted, folder, again)
        torch.testing.assert_close(logits_of(adapted.model), expected, rtol=1e-5, atol=1e-5)
        train_steps(adapted, again)
        second, trained = store_adapter(adapted, again, tmp_path / "second"), logits_of(adapted.model)
    assert not torch.allclose(trained, expected, atol=1e-2)
    torch.testing.assert_close(logits_by_peft(load_model(small, "nf4"), second), trained, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def stored(small: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An adapter of a method; each is trained once."""

    @cache
    def store(method: str) -> Path:
        # Untrained, AdaLoRA's ranks would all be pruned, and any job's ranks would suffice.
        spec = spec_of(method=method, steps=2)
        with trained_model(load_model(small, "nf4"), spec, small.folder) as adapted:
            return store_adapter(adapted, spec, tmp_path_factory.mktemp(method) / "first")

    return store


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2, "alpha": 3.0, "init_rank": 3},
        {"alpha": 7.0},
        {"rslora": True},
        {"targets": ("q_proj",)},
        {"layers": (0,)},
        {"alpha_pattern": {"k_proj": 1.0}},
        {"method": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_kind_is_refused(
    small: Base, stored: Callable[[str], Path], method: str, change: dict[str, Any]
) -> None:
    folder, model = stored(method), load_model(small, "nf4")
    other = {"lora": "dora", "loftq": "dora", "adalora": "dora"}.get(method, "lora")
    other_spec = spec_of(**{"method": method} | change | ({"method": other} if "method" in change else {}))
    with (
        attach_adapter(model, other_spec, small.folder) as adapted,
        pytest.raises(AdapterInvalid, match="leave out") as refused,
    ):
        load_start_adapter(adapted, folder, other_spec)
    assert refused.value.param == "start_from"


@pytest.mark.parametrize("config", [None, "{", "[]", '{"peft_type": "PREFIX_TUNING"}'])
def test_a_folder_without_an_adapter_is_refused(small: Base, tmp_path: Path, config: str | None) -> None:
    with trained_model(load_model(small), spec_of(steps=1), small.folder) as adapted:
        folder = store_adapter(adapted, spec_of(), tmp_path / "first")
        (folder / "adapter_config.json").unlink()
        if config is not None:
            (folder / "adapter_config.json").write_text(config)
        with pytest.raises(AdapterInvalid, match=r"can't be read|no LoRA"):
            load_start_adapter(adapted, folder, spec_of())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_equal_those_of_peft(small: Base, method: str, rslora: bool) -> None:
    """The weights are from the middle of training, where DoRA's magnitudes differ from the norms."""
    spec = spec_of(method=method, rslora=rslora)
    plain = get_peft_model(load_model(small), lora_config(spec))
    with trained_model(load_model(small), spec, small.folder) as adapted:
        theirs = {
            name.replace(".default", "").replace("vector.weight", "vector"): p for name, p in plain.named_parameters()
        }
        with torch.no_grad():
            for name, weight in adapted.weights.items():
                weight.add_(torch.randn(weight.shape), alpha=0.05)
                theirs[name].copy_(weight)
        loss, expected = loss_of(adapted.model, tokens()), loss_of(plain, tokens())
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, weight in adapted.weights.items():
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


def test_dora_computes_its_norms_after_every_step(small: Base) -> None:
    spec = spec_of(method="dora", steps=4)
    with trained_model(load_model(small), spec, small.folder) as adapted:
        for name, layer in adapted.model.named_modules():
            if hasattr(layer, "magnitude"):
                merged = layer.linear.weight + layer.scale * layer.b @ layer.a
                torch.testing.assert_close(layer.row_norms(), merged.norm(dim=1), msg=name)
                assert not torch.allclose(layer.row_norms(), layer.linear.weight.norm(dim=1))


def test_doras_gains_are_published_with_the_version(small: Base, tmp_path: Path) -> None:
    for method in ("dora", "lora"):
        spec = spec_of(method=method)
        with trained_model(load_model(small), spec, small.folder) as adapted:
            folder = store_adapter(adapted, spec, tmp_path / method)
            without = adapter_files(spec, adapted.weights, adapted.state, "small")
        # The files that PEFT reads are the same as those of a checkpoint without gains.
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert {name: files[name] for name in without} == without
        assert files.keys() - without.keys() == ({GAINS_FILE} if method == "dora" else set())
    model = load_model(small)
    base = BaseModules.of_model(model, model.get_output_embeddings())
    published = read_adapter(tmp_path / "dora", base)
    computed = read_adapter(tmp_path / "dora", base, published_gains=False)
    for module, delta in published.items():
        assert delta.gain is not None and delta.gain.dtype == torch.float32
        torch.testing.assert_close(delta.gain, computed[module].gain)


def test_dropout_is_off_by_default(small: Base) -> None:
    spec = spec_of(dropout=0.5)
    with trained_model(load_model(small), spec, small.folder) as adapted:
        still = logits_of(adapted.model)
        assert torch.equal(logits_of(adapted.model), still)
        adapted.set_dropout(1)
        first = logits_of(adapted.model)
        adapted.set_dropout(2)
        assert not torch.equal(first, still) and not torch.equal(first, logits_of(adapted.model))
        adapted.set_dropout(None)
        assert torch.equal(logits_of(adapted.model), still)


def test_loraplus_has_a_learning_rate_for_b(small: Base) -> None:
    for method in ("lora", "dora", "pissa", "adalora"):
        with attach_adapter(load_model(small), spec_of(method=method, loraplus_lr_ratio=16.0), small.folder) as adapted:
            parts = {name.split(".lora_")[1]: rate for name, rate in adapted.lr_factors.items()}
            assert parts["B.weight"] == 16.0 and "A.weight" not in parts
    with attach_adapter(load_model(small), spec_of(), small.folder) as adapted:
        assert not adapted.lr_factors


@pytest.mark.parametrize(
    ("method", "kind"), [(method, "qwen2") for method in METHODS] + [(method, "gpt2") for method in METHODS[:-1]]
)
def test_other_model_families_train(tmp_path: Path, method: str, kind: str) -> None:
    """GPT-2's weights are transposed; Qwen2's q, k and v have biases, which DoRA does not scale."""
    sizes = {"vocab_size": 64, "num_attention_heads": 4}
    family, config = {
        "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)),
        "qwen2": (
            Qwen2ForCausalLM,
            Qwen2Config(**sizes, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=2),
        ),
    }[kind]
    model = family(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    base = Base("other", tmp_path / "base", "0" * 64, "", 128, "nf4" if method == "loftq" else "none")
    model, spec = load_model(base, base.quantization), spec_of(method=method, targets=("all-linear",), steps=4)
    with trained_model(model, spec, base.folder) as adapted:
        folder, expected = store_adapter(adapted, spec, tmp_path / "adapter"), logits_of(adapted.model)
    torch.testing.assert_close(
        logits_by_peft(load_model(base, base.quantization), folder), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_files_depend_on_the_weights_and_not_on_the_machine(small: Base, tmp_path: Path, method: str) -> None:
    spec, model = spec_of(method=method, targets=("all-linear",), steps=3), load_model(small, "nf4")
    folders = []
    for name in ("first", "second"):
        with trained_model(model, spec, small.folder) as adapted:
            folders.append(store_adapter(adapted, spec, tmp_path / name))
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small" and config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True and config["inference_mode"]
    PeftModel.from_pretrained(load_model(small), folders[0])
