"""The fused layers in Triton's interpreter, against autograd and transformers; test_fused.py runs this.

Rounding is tested in float16, for which the interpreter rounds as a GPU does; it cuts bfloat16's bits off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loramill.data.encoding import EncodedExample
from loramill.jobs.train import forward
from loramill.jobs.train.forward import configured_forward, loss_and_accuracy, recomputed_layers
from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.ops import fused
from loramill.jobs.train.ops.layers import fused_forwards
from loramill_bench.kernels import cuda_training
from loramill_bench.kernels.cuda_training import CHECKED, Case

from ...transformers_families import FAMILIES, tiny_family
from ...triton_interpreter import fast_interpreter, nan_in_fresh_memory  # noqa: F401
from .tiny_training import NOWHERE, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

Operation = Callable[..., Any]
NORMS = {False: LlamaRMSNorm, True: Gemma2RMSNorm}
EPS = 1e-3
EXAMPLES = [EncodedExample((1, 2, 3, 4, 5), 2), EncodedExample((6, 7, 8, 9), 1)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def results(operation: Operation, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """An operation's outputs, and the gradients of its inputs."""
    leaves = [each.detach().requires_grad_(True) for each in inputs]
    found = operation(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    back = [drawn(*each.shape, seed=7 + number).to(each.dtype) for number, each in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, back)]


def check(ours: Operation, theirs: Operation, inputs: Sequence[torch.Tensor]) -> None:
    """Float32 results within 1e-6 of transformers' and 1e-6 of float64's; float16 results with transformers' bits."""
    exact = results(theirs, [each.double() for each in inputs])
    for got, other, best in zip(results(ours, inputs), results(theirs, inputs), exact, strict=True):
        assert (got - other).norm() <= 1e-6 * other.norm()
        assert (got - best).norm() <= 1e-6 * best.norm()
    halves = [each.half() for each in inputs]
    for got, other in zip(results(ours, halves), results(theirs, halves), strict=True):
        # A float32 number that differs in its last bits may cross a boundary of float16 now and then.
        assert got.dtype == torch.float16 and (got != other).sum() <= max(1, got.numel() // 20)
        torch.testing.assert_close(got, other, rtol=2**-10, atol=1e-6)


def exact_norm(weight: torch.Tensor, plus_one: bool) -> Operation:
    """transformers' norm; float64 inputs are computed in float64."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
            return scaled * (weight.double() + plus_one)
        module = NORMS[plus_one](x.shape[-1], eps=EPS).requires_grad_(False).to(x.dtype)
        module.weight.copy_(weight)
        made: torch.Tensor = module(x)
        return made

    return norm


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(
    "x",
    [drawn(1, 5), drawn(3, 5, 40)[..., 3:], drawn(64, 33, 2).permute(2, 1, 0), drawn(2, 1, 2100).expand(2, 2, 2100)],
    ids=["one row", "strided rows", "transposed", "expanded"],
)
def test_norms_equal_those_of_transformers(x: torch.Tensor, plus_one: bool) -> None:
    weight = drawn(x.shape[-1], seed=1)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, weight.to(x.dtype), EPS, plus_one=plus_one)

    check(norm, exact_norm(weight, plus_one), [x])


def test_a_norm_keeps_a_nan_in_its_row() -> None:
    x = drawn(5, 48)
    x[2, 3] = torch.nan
    outputs = results(lambda x: fused.rms_norm(x, torch.ones(48), EPS, plus_one=False), [x])
    for each in outputs:
        assert each.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 171), (4, 2, 128)], ids=str)
def test_gated_products_equal_those_of_transformers(shape: tuple[int, ...], gelu: bool) -> None:
    def exact(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        mlp = SimpleNamespace(gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda y: y)
        return fused.gated_mlp(mlp, gate, gelu=gelu)

    gate, up = drawn(*shape, size=3.0), drawn(*reversed(shape), seed=1).permute(*reversed(range(len(shape))))
    check(product, exact, [gate, up])


def test_an_activation_of_large_numbers_is_finite() -> None:
    for gelu in (False, True):
        gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4])
        outputs = results(lambda g, u, gelu=gelu: fused._Gated.apply(g, u, gelu), [gate, torch.ones(6)])
        assert all(each.isfinite().all() for each in outputs)
        torch.testing.assert_close(outputs[0], gate.clamp(min=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "width"), [(1, 4, 2, 16), (2, 9, 3, 24), (2, 5, 1, 6), (1, 70, 2, 64)], ids=str
)
def test_rotations_equal_those_of_transformers(rows: int, heads: int, kv_heads: int, width: int) -> None:
    angles = drawn(rows, 2, width // 2, size=3.0).repeat(1, 1, 2)
    q, k = drawn(2, 2, heads, width).transpose(1, 2), drawn(2, 2, kv_heads, width, seed=1).transpose(1, 2)

    def rotation(function: Operation) -> Operation:
        return lambda q, k: function(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))

    check(rotation(fused.apply_rotary), rotation(apply_rotary_pos_emb), [q, k.contiguous()])


def test_the_bench_checks_run_on_a_cpu_and_detect_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {case.kind: Case(case.kind, ((1, 2, 3, 8),) * len(case.shapes)) for case in CHECKED}
    checks = [*cuda_training.check("cpu", dtypes=[torch.float32], cases=[*kinds.values()])]
    assert all(check.passed for check in checks), checks
    assert len(checks) == 2 * (2 * 2 + 2 * 3 + 4)
    monkeypatch.setattr(fused, "launch", lambda *_, **__: None)
    failed = [*cuda_training.check("cpu", dtypes=[torch.float32], cases=[*kinds.values()])]
    assert not any(check.passed for check in failed)


def gradients(model: PreTrainedModel, spec: Any) -> list[torch.Tensor]:
    """The loss and the gradients of an adapter."""
    with attach_adapter(model, spec, NOWHERE) as adapted:
        for number, (name, weight) in enumerate(adapted.weights.items()):
            if name.endswith("lora_B.weight"):
                weight.data.copy_(drawn(*weight.shape, seed=number, size=0.1))
        adapted.set_dropout(3)
        with configured_forward(model, 1000), recomputed_layers(model, spec.gradient_checkpointing):
            loss, _ = loss_and_accuracy(model, model, EXAMPLES, 10.0, packing=False)
            loss.backward()
        return [loss.detach(), *(weight.grad for weight in adapted.weights.values())]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_get_the_gradients_of_unfused_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family(family)
    monkeypatch.setattr(forward, "layer_forwards", lambda *_: ())
    theirs = gradients(model, spec_of())
    monkeypatch.setattr(forward, "layer_forwards", lambda model, _: fused_forwards(model))
    ours = gradients(model, spec_of())
    for got, other in zip(ours, theirs, strict=True):
        assert (got - other).norm() <= 1e-5 * other.norm() > 0


def test_recomputed_fused_layers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("Qwen3", torch.float16)
    monkeypatch.setattr(forward, "layer_forwards", lambda model, _: fused_forwards(model))
    kept, recomputed = (
        gradients(model, spec_of(dropout=0.3, gradient_checkpointing=recompute)) for recompute in (False, True)
    )
    assert all(map(torch.equal, kept, recomputed))
