"""The fused layers of training on a real GPU: correctness in every dtype, and time compared with moving their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

from loramill_bench.kernels.cuda import LIMITS, Check, copy_bandwidth, median_us

Kind = Literal["norm", "norm plus one", "swiglu", "geglu", "rotation"]

_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and the shapes of its inputs, which have a gradient; queries and keys are [rows, tokens, heads, d]."""

    kind: Kind
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.kind} {' '.join('x'.join(map(str, shape)) for shape in self.shapes)}"

    def constant(self, dtype: torch.dtype, device: str) -> torch.Tensor:
        """The weight of a norm, [d], or the angles of a rotation, [1, tokens, d]."""
        *_, tokens, _, width = (1, 1, 1, *self.shapes[0])
        if self.kind == "rotation":
            return torch.randn(1, tokens, width // 2).repeat(1, 1, 2).to(device, dtype)
        return torch.randn(width).to(device, dtype)


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of a layer's forward and backward pass together, in microseconds.

    Attributes:
        us: Time of the kernels.
        floor_us: Time of copying as many bytes as they read and write.
        unfused_us: Time of the operations of torch that transformers calls.
    """

    us: float
    floor_us: float
    unfused_us: float


#: 4,096 tokens of Llama-3-8B, and how often both passes together read or write as much as all inputs: a norm reads x
#: twice, dy once, and writes y and dx.
CASES: dict[Case, int] = {
    Case("norm", ((4096, 4096),)): 5,
    Case("swiglu", ((4096, 14336), (4096, 14336))): 4,
    Case("rotation", ((1, 4096, 32, 128), (1, 4096, 8, 128))): 4,
}
#: Cases of `check`: odd widths; rows of SmolLM2, Llama-3-8B and 70B; norms of heads; Gemma.
CHECKED = (
    *(Case("norm", ((3, width),)) for width in (37, 576, 4096, 8192)),
    *(Case("norm plus one", (shape,)) for shape in ((2, 3, 5, 128), (3, 2304))),
    *(Case("swiglu", ((3, width), (3, width))) for width in (37, 14336)),
    *(Case("geglu", ((3, width), (3, width))) for width in (37, 9216)),
    *(
        Case("rotation", ((2, 5, heads, width), (2, 5, kv_heads, width)))
        for heads, kv_heads, width in ((9, 3, 64), (32, 8, 128), (8, 4, 256), (5, 1, 6))
    ),
)


def check(
    device: str = "cuda", *, dtypes: Iterable[torch.dtype] = tuple(LIMITS), cases: Sequence[Case] = CHECKED
) -> Iterator[Check]:
    """Compares outputs and gradients with torch's in float32, and a second call with the first."""
    for dtype in dtypes:
        for case in cases:
            constant, *inputs = [case.constant(dtype, "cpu"), *(torch.randn(shape).to(dtype) for shape in case.shapes)]
            exact = _results(case.kind, constant.float(), [each.float() for each in inputs], fused=False)
            there = constant.to(device), [each.to(device) for each in inputs]
            first, second = (_results(case.kind, *there, fused=True) for _ in range(2))
            for name, expected in exact.items():
                error = (first[name].cpu().float() - expected).abs().max() / expected.abs().max()
                yield Check(str(case), str(dtype), name, error.item(), LIMITS[dtype])
                differs = not torch.equal(first[name], second[name])
                yield Check(str(case), str(dtype), f"{name}, called again", float(differs), 0.5)


def timing(case: Case) -> Timing:
    """Times one of `CASES` on the current GPU, in bfloat16."""
    constant = case.constant(torch.bfloat16, "cuda")
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in case.shapes]
    fused, unfused = (median_us(partial(_results, case.kind, constant, inputs, fused=fused)) for fused in (True, False))
    size = CASES[case] * sum(each.nbytes for each in inputs)
    return Timing(fused, size / copy_bandwidth() * 1e6, unfused)


def _results(
    kind: Kind, constant: torch.Tensor, inputs: Sequence[torch.Tensor], *, fused: bool
) -> dict[str, torch.Tensor]:
    """The outputs, and the inputs' gradients for an output's gradient that is the output."""
    leaves = [each.detach().requires_grad_(True) for each in inputs]
    outputs = (_fused if fused else _unfused)(kind, constant, leaves)
    gradients = torch.autograd.grad(outputs, leaves, [each.detach() for each in outputs])
    named = {f"output {number}": each.detach() for number, each in enumerate(outputs)}
    return named | {f"gradient {number}": each for number, each in enumerate(gradients)}


def _fused(kind: Kind, constant: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    from loramill.jobs.train.ops import fused

    if kind in ("norm", "norm plus one"):
        return (fused.rms_norm(inputs[0], constant, _EPS, plus_one=kind == "norm plus one"),)
    if kind == "rotation":
        q, k = (each.transpose(1, 2) for each in inputs)
        return fused.apply_rotary(q, k, constant.cos(), constant.sin())
    gate, up = inputs
    mlp = SimpleNamespace(gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda product: product)
    return (fused.gated_mlp(mlp, gate, gelu=kind == "geglu"),)


def _unfused(kind: Kind, constant: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    if kind in ("norm", "norm plus one"):
        wide = inputs[0].float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
        if kind == "norm":
            return (constant * normed.to(inputs[0].dtype),)
        return ((normed * (1.0 + constant.float())).type_as(inputs[0]),)
    if kind == "rotation":
        q, k = (each.transpose(1, 2) for each in inputs)
        turned: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(q, k, constant.cos(), constant.sin())
        return turned
    gate, up = inputs
    return ((F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up,)
