"""A base in four bits computes as one of dense rounded values."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.methods.pissa_loftq import weight_of
from loramill.models.catalog import Base

from ....llama import tiny_llama, write_base
from .method_training import load_model, logits_of, loss_of, spec_of, tokens


@pytest.fixture(scope="module", params=[64, 80], ids=["whole blocks", "blocks across rows"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    model = tiny_llama(
        vocab_size=64,
        hidden_size=request.param,
        intermediate_size=2 * request.param,
        max_position_embeddings=128,
        attention_bias=True,
    )
    folder = write_base(tmp_path_factory.mktemp("packed"), model)
    return Base("packed", folder, "0" * 64, "LlamaForCausalLM", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "loftq"])
def test_values_logits_and_gradients_equal_those_of_dense_weights(base: Base, method: str, dtype: torch.dtype) -> None:
    spec, results = spec_of(method=method, targets=("all-linear",)), []
    dense = dict(load_model(base, "nf4", dtype).named_modules())
    for packed in (False, True):
        model = load_model(base, "nf4", dtype, packed=packed)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        assert len(linears) == (14 if packed else 0)
        for name, linear in linears.items():
            assert linear.weight.dtype == torch.uint8 and linear.weight.quant_state.nested
            assert torch.equal(weight_of(linear), dense[name].weight)
        with attach_adapter(model, spec, base.folder) as adapted:
            with torch.no_grad():
                for name, weight in adapted.weights.items():
                    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                    weight.add_(drawn, alpha=0.02)
            loss_of(adapted.model, tokens()).backward()
            results.append([logits_of(adapted.model), *(weight.grad.clone() for weight in adapted.weights.values())])
    assert all(map(torch.equal, *results))


def test_int8_stays_dense(base: Base) -> None:
    packed, dense = load_model(base, "int8", packed=True), load_model(base, "int8")
    assert all(map(torch.equal, packed.parameters(), dense.parameters()))
