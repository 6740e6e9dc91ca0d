"""The elementwise layers of a base on a CPU in bfloat16, by native kernels: what `fused` has for a GPU.

Each reads its inputs once, in the forward and in the backward pass, and rounds its results alone.
"""

from __future__ import annotations

from ctypes import CDLL
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from loramill.kernels.cpu import training_layers as kernels
from loramill.kernels.training import native_library


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * w (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        ctx.native, x = native_library(x.device, x.dtype), x.contiguous()
        y, factors = kernels.rms_norm(ctx.native, x, weight, float(plus_one), eps)
        ctx.save_for_backward(x, weight, factors)
        ctx.offset = float(plus_one)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, factors = ctx.saved_tensors
        d_x = kernels.rms_norm_gradient(ctx.native, d_y.contiguous(), x, weight, factors, ctx.offset)
        return d_x, None, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.native = native_library(gate.device, gate.dtype)
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.gated(ctx.native, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return kernels.gated_gradients(ctx.native, d_y.contiguous(), *ctx.saved_tensors)


class _Rotary(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864); the gradient is the rotation back, and keeps no q and k."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.native, angles = native_library(q.device, q.dtype), (cos.contiguous(), sin.contiguous())
        ctx.save_for_backward(*angles)
        return tuple(_turned(ctx.native, each, *angles, inverse=False) for each in (q, k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        angles = ctx.saved_tensors
        return *(_turned(ctx.native, each, *angles, inverse=True) for each in gradients), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, plus_one: bool) -> torch.Tensor:
    """An RMS norm over the last axis, with a gradient in x alone; arguments as of `fused.rms_norm`."""
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return y


def gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The MLP of a Llama-like model of transformers with SiLU: down_proj(silu(gate_proj(x)) * up_proj(x))."""
    product = _Gated.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    y: torch.Tensor = module.down_proj(product)
    return y


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb`; arguments as of `fused.apply_rotary`."""
    turned: tuple[torch.Tensor, torch.Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def _turned(library: CDLL, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    return kernels.turned(library, x.transpose(1, 2).contiguous(), cos, sin, inverse=inverse).transpose(1, 2)
