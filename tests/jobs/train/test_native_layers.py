"""Which layers a CPU computes by native kernels in bfloat16, and that a model gives what transformers' layers give."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from loramill.jobs.train.batching import pack
from loramill.jobs.train.forward import configured_forward, predict
from loramill.jobs.train.methods.layers import AdaptedLinear, PassRows
from loramill.jobs.train.ops.layers import layer_forwards
from loramill.kernels import products, torch_backend, training

from .test_fused import FAMILIES, tiny_family
from .tiny_training import random_examples

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_each_family_are_native_in_bfloat16(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: False)
    model = tiny_family(family).to(torch.bfloat16)
    names = Counter(type(module).__name__ for module, _ in layer_forwards(model, CPU))
    all_names = Counter(type(module).__name__ for module in model.modules())
    kinds = ["RMSNorm", "Attention"] + ["MLP"] * (not family.startswith("Gemma"))  # whose activation is GELU
    assert names == {f"{family}{kind}": all_names[f"{family}{kind}"] for kind in kinds}


@pytest.mark.parametrize("lacking", [True, False])
def test_frozen_linears_are_computed_in_float32_where_bfloat16_is_slow(
    lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: lacking)
    model = tiny_family("Llama").to(torch.bfloat16).requires_grad_(False)
    linears = {module for module in model.modules() if type(module) is torch.nn.Linear}
    trained, adapted, *others = sorted(linears, key=id)
    trained.requires_grad_(True)
    adapted.forward = AdaptedLinear(adapted, PassRows(), is_head=False, replaced=None).forward
    replaced = {module for module, _ in layer_forwards(model, CPU) if module in linears}
    assert replaced == (set(others) if lacking else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_transformers_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = tiny_family(family), []
    rows = pack(random_examples(4, seed=1))
    for dtype, native in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)):
        own = model.to(dtype).requires_grad_(False)
        monkeypatch.setattr(training, "backend", training.backend if native else lambda _: torch_backend)
        weight = own.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
        with configured_forward(own, 300):
            [predictions] = predict(own, own, [rows])
            loss, _ = predictions.cross_entropy(10.0)
        found.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    native_loss, native_gradient = found[0]
    plain, exact = found[1], found[2]
    assert abs(native_loss - exact[0]) <= 0.01 * exact[0]
    near = max((plain[1] - exact[1]).norm(), 0.01 * exact[1].norm())
    assert (native_gradient - exact[1]).norm() <= 1.5 * near
