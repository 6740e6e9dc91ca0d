"""A and B are cast to the base's dtype once per optimizer step where memory allows it; nothing else changes by that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loramill.jobs.train.forward import recomputed_layers
from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.layers import adapted_linear
from loramill.kernels import torch_backend, training
from loramill.models.catalog import Base

from .method_training import load_model, loss_of, spec_of, tokens

METHODS = ("lora", "dora", "adalora", "pissa")


@pytest.fixture
def without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the native kernels need no casts."""
    monkeypatch.setattr(training, "backend", lambda _: torch_backend)


class Casts(TorchDispatchMode):
    """Counts the casts of matrices of a low rank from float32 to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            Casts.count += args[0].ndim == 2 and min(args[0].shape) <= 8
        return func(*args, **(kwargs or {}))


def accumulate(adapted: AdaptedModel) -> None:
    """Three passes of a step, forward and backward."""
    for seed in range(3):
        loss_of(adapted.model, tokens(rows=1, length=12, seed=seed)).backward()


@pytest.mark.usefixtures("without_native_kernels")
@pytest.mark.parametrize(("method", "recomputed"), [*((method, False) for method in METHODS), ("lora", True)])
def test_the_passes_of_a_step_share_one_cast_unless_recomputed(method: str, recomputed: bool, small: Base) -> None:
    model, spec = load_model(small, dtype=torch.bfloat16), spec_of(method=method, gradient_checkpointing=recomputed)
    with attach_adapter(model, spec, small.folder) as adapted, recomputed_layers(model, recomputed):
        matrices = 2 * 7 * model.config.num_hidden_layers
        optimizer = torch.optim.AdamW(adapted.weights.values(), lr=1e-2, fused=True)
        for step in (1, 2):
            Casts.count = 0
            with Casts():
                accumulate(adapted)
            # Three passes, each forward and recomputed.
            assert Casts.count == (6 * matrices if recomputed else matrices)
            optimizer.step()
            adapted.after_step(step)
            optimizer.zero_grad()


def test_the_native_kernels_need_no_casts(small: Base) -> None:
    model, spec = load_model(small, dtype=torch.bfloat16), spec_of()
    with attach_adapter(model, spec, small.folder) as adapted:
        Casts.count = 0
        with Casts():
            accumulate(adapted)
        assert Casts.count == 0 and all(weight.grad is not None for weight in adapted.weights.values())


@pytest.mark.usefixtures("without_native_kernels")
@pytest.mark.parametrize("method", METHODS)
def test_shared_casts_change_no_bit(method: str, small: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec, found = load_model(small, dtype=torch.bfloat16), spec_of(method=method, dropout=0.2), []
    for shared in (True, False):
        with attach_adapter(model, spec, small.folder) as adapted:
            if not shared:  # cast by autograd in each pass
                layers = [
                    layer
                    for module in model.modules()
                    if (adapted_there := adapted_linear(module)) is not None
                    for layer in adapted_there.layers.values()
                ]
                for layer in layers:
                    own = layer.factors
                    monkeypatch.setattr(
                        layer, "factors", lambda own=own: tuple(each.to(torch.bfloat16) for each in own())
                    )
            optimizer = torch.optim.AdamW(adapted.weights.values(), lr=1e-2, fused=True)
            for step in (1, 2):
                optimizer.zero_grad()
                accumulate(adapted)
                optimizer.step()
                adapted.after_step(step)
            found.append([each for weight in adapted.weights.values() for each in (weight.detach(), weight.grad)])
    assert len(found[0]) > 80 and all(map(torch.equal, *found))


def test_a_weight_that_is_changed_is_cast_again(small: Base) -> None:
    model, spec = load_model(small, dtype=torch.bfloat16), spec_of()
    with attach_adapter(model, spec, small.folder) as adapted, torch.no_grad():
        before = loss_of(model, tokens())
        for weight in adapted.weights.values():
            weight.add_(0.1)
        assert loss_of(model, tokens()) != before
