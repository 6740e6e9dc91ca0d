"""RMS normalization with a frozen weight, for training on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * w (Zhang & Sennrich 2019, arXiv 1910.07467): half of autograd's operations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul(scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float().mul(scale)
        d_normed = (dy * weight).float()
        along = torch.linalg.vecdot(d_normed, normed)[..., None] / x.shape[-1]
        dx = torch.addcmul(d_normed, normed, along, value=-1).mul_(scale)
        return dx.to(x.dtype), None, None


def rms_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The RMSNorm of a Llama-like model of transformers, differentiable in x alone.

    Args:
        module: has a frozen `weight` and a `variance_epsilon`.
        x: [..., d].
    """
    y: torch.Tensor = _RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return y
