"""The training's own attention and loss against torch's, in value and gradient."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from loramill.jobs.train.forward import configured_forward
from loramill.jobs.train.ops import attention
from loramill.jobs.train.ops.attention import attend
from loramill.jobs.train.ops.loss import cross_entropy
from loramill.jobs.train.ops.norm import rms_norm

from .tiny_training import tiny_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    assert (ours.float() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_equals_eager_attention(dtype: torch.dtype, heads: int, kv_heads: int, rows: int) -> None:
    tokens, width = 17, 24  # whose square root is not a power of two
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        made = torch.randn(rows, tokens, count, width, generator=generator).to(dtype)
        return made.transpose(1, 2).requires_grad_(True)

    inputs = [drawn(heads), drawn(kv_heads), drawn(kv_heads)]
    exact = [each.detach().float().requires_grad_(True) for each in inputs]
    owner = torch.arange(tokens) // 6
    attended = (owner[:, None] == owner).tril()
    mask = torch.zeros(rows, 1, tokens, tokens).masked_fill(~attended, -math.inf)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False)
    theirs, _ = eager_attention_forward(module, *exact, mask, width**-0.5)  # type: ignore[arg-type]
    ours, _ = attend(module, *inputs, mask.to(dtype), scaling=width**-0.5)  # type: ignore[arg-type]
    near(ours, theirs, dtype)
    back = torch.randn(theirs.shape, generator=generator)
    gradients = torch.autograd.grad(theirs, exact, back)
    for own, other in zip(torch.autograd.grad(ours, inputs, back.to(dtype)), gradients, strict=True):
        near(own, other, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 200.0])  # large logits overflow what isn't shifted
def test_loss_is_the_weighted_cross_entropy(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(11, 301, generator=generator) * size).to(dtype).requires_grad_(True)
    labels = torch.randint(301, (11,), generator=generator)
    labels[:4] = logits[:4].argmax(-1)
    weights = torch.rand(11, generator=generator)
    before = logits.detach().clone()
    loss, correct = cross_entropy(logits, labels, weights)
    exact = logits.detach().double().requires_grad_(True)
    theirs = (F.cross_entropy(exact, labels, reduction="none") * weights).sum()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert correct.item() == pytest.approx(weights[exact.argmax(-1) == labels].sum().item())
    near(*torch.autograd.grad(loss * 3, logits), torch.autograd.grad(theirs * 3, exact)[0].float(), dtype)
    assert torch.equal(logits, before)


def test_a_loss_without_gradient_keeps_nothing() -> None:
    logits = torch.randn(3, 7)
    loss, correct = cross_entropy(logits, torch.tensor([1, 2, 3]), torch.ones(3))
    assert not loss.requires_grad and not correct.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(40, eps=0.3).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    x = torch.randn(2, 7, 40, generator=generator).to(dtype).requires_grad_(True)
    exact = x.detach().float().requires_grad_(True)
    back = torch.randn(2, 7, 40, generator=generator)
    theirs = norm(exact)
    ours = rms_norm(norm.to(dtype), x)
    near(ours, theirs, dtype)
    near(*torch.autograd.grad(ours, x, back.to(dtype)), torch.autograd.grad(theirs, exact, back)[0], dtype)


def test_a_norm_that_is_trained_keeps_its_own_forward() -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(True)
    with configured_forward(model, 300, checkpointing=False):
        assert "forward" in vars(model.model.layers[0].input_layernorm) and "forward" not in vars(model.model.norm)
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_supported_models_use_the_attention_for_short_rows() -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    short, qwen = tiny_model(), Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=2, **small))
    for model in (short, qwen):
        with configured_forward(model, 300, checkpointing=False):
            assert model.config._attn_implementation == attention.IMPLEMENTATION_NAME
        with configured_forward(model, 3000, checkpointing=False):
            assert model.config._attn_implementation == "sdpa"
