"""PiSSA and LoftQ against plain LoRA on a changed base, and against exact singular values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition

from loramill.errors import AdapterInvalid, BaseUnusable
from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.methods.peft_folder import lora_config, modules_of, tensor_name
from loramill.jobs.train.methods.pissa_loftq import A0, B0
from loramill.models.catalog import Base

from .method_training import load_model, logits_of, loss_of, spec_of, tokens, train_steps, trained_model


def test_pissa_is_lora_on_the_base_without_its_initial_factors(small: Base) -> None:
    """The paper's form, by plain PEFT: the same loss and gradients, and the same logits after the same change."""
    spec = spec_of(method="pissa", targets=("q_proj", "up_proj"))
    changed = load_model(small)
    with attach_adapter(load_model(small), spec, small.folder) as adapted, torch.no_grad():
        for module in modules_of(adapted.weights):
            a, b = (adapted.state[tensor_name(module, part)] for part in (A0, B0))
            changed.get_submodule(module).weight.sub_(b @ a, alpha=1.5)
        plain = get_peft_model(changed, lora_config(spec))
        theirs = {name.replace(".default", ""): p for name, p in plain.named_parameters() if p.requires_grad}
        assert theirs.keys() == adapted.weights.keys()
        for name, weight in adapted.weights.items():
            theirs[name].copy_(weight)
        with torch.enable_grad():
            loss, expected = loss_of(adapted.model, tokens()), loss_of(plain, tokens())
            loss.backward()
            expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, weight in adapted.weights.items():
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
            weight.sub_(0.1)
            theirs[name].sub_(0.1)
        torch.testing.assert_close(logits_of(adapted.model), logits_of(plain), rtol=1e-4, atol=1e-4)


def test_weight_decay_does_not_change_the_frozen_half(small: Base) -> None:
    spec = spec_of(method="pissa", weight_decay=0.5)
    with attach_adapter(load_model(small), spec, small.folder) as adapted:
        frozen = {name: tensor.clone() for name, tensor in adapted.state.items()}
        trainable = {name: weight.detach().clone() for name, weight in adapted.weights.items()}
        train_steps(adapted, spec)
        assert frozen and all(torch.equal(tensor, frozen[name]) for name, tensor in adapted.state.items())
        assert not any(torch.equal(weight, trainable[name]) for name, weight in adapted.weights.items())


@pytest.mark.parametrize("method", ["pissa", "loftq"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_initial_factors_are_nearly_the_best_approximation(small: Base, method: str, quantization: str) -> None:
    model, originals = load_model(small, quantization), load_model(small)
    with attach_adapter(model, spec_of(method=method, rslora=True), small.folder) as adapted:
        for module in modules_of(adapted.weights):
            a, b = (adapted.weights[tensor_name(module, part)] for part in ("lora_A.weight", "lora_B.weight"))
            weight = model.get_submodule(module).weight
            target = originals.get_submodule(module).weight - weight if method == "loftq" else weight
            exact = _low_rank_decomposition(target, reduced_rank=4)
            least = (target - exact["L"] @ exact["R"]).norm()
            assert (target - 6.0 / 2 * b @ a).norm() <= 1.01 * least


def test_loftq_changes_the_initial_factors_alone(small: Base) -> None:
    with attach_adapter(load_model(small, "nf4"), spec_of(method="loftq"), small.folder) as adapted:
        assert not adapted.state and not adapted.lr_factors


def test_loftq_starts_as_lora_where_quantization_lost_nothing(small: Base) -> None:
    spec = spec_of(method="loftq", targets=("q_proj", "lm_head"), steps=2)
    with trained_model(load_model(small, "nf4"), spec, small.folder) as adapted:
        assert all(weight.any() for name, weight in adapted.weights.items())


def test_loftq_needs_a_quantized_base_and_its_files(small: Base, tmp_path: Path) -> None:
    unquantized, spec = load_model(small, dtype=torch.bfloat16), spec_of(method="loftq")
    with (
        pytest.raises(AdapterInvalid, match="is not quantized") as refused,
        attach_adapter(unquantized, spec, small.folder),
    ):
        pass
    assert refused.value.param == "method"
    with pytest.raises(BaseUnusable), attach_adapter(load_model(small, "nf4"), spec_of(method="loftq"), tmp_path):
        pass


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_a_rank_above_the_number_of_singular_values_is_refused(small: Base, method: str) -> None:
    model, spec = load_model(small, "int8"), spec_of(method=method, rank=33)
    with (
        pytest.raises(AdapterInvalid, match=r"k_proj.* 32 singular values") as refused,
        attach_adapter(model, spec, small.folder),
    ):
        pass
    assert refused.value.param == "rank"
