"""The operations of a training pass between its products, by the native kernels: norms, SwiGLU, rotary positions, and
the cross-entropy of logits.

All tensors are of the element type of the library, and contiguous unless a docstring states otherwise.
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_void_p
from typing import Any

import torch

#: Arguments of the functions of training_layers.c; counts are declared as in `decoder_ops`.
SIGNATURES: dict[str, list[Any]] = {
    "train_norm_forward": [*[c_void_p] * 6, c_float, c_float],
    "train_norm_backward": [*[c_void_p] * 7, c_float],
    "train_gated_forward": [c_void_p] * 4,
    "train_gated_backward": [c_void_p] * 6,
    "train_turn": [*[c_void_p] * 8, c_float],
    "train_losses": [c_void_p] * 9,
}


def rms_norm(
    library: CDLL, x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x / sqrt(mean x^2 + eps) * (weight + offset), and float32 factors [rows] for `rms_norm_gradient`."""
    y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    factors = x.new_empty(rows, dtype=torch.float32)
    library.train_norm_forward(
        *(x.data_ptr(), weight.data_ptr(), y.data_ptr(), factors.data_ptr(), rows, x.shape[-1], offset, eps)
    )
    return y, factors


def rms_norm_gradient(
    library: CDLL, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor, offset: float
) -> torch.Tensor:
    """Returns the gradient of x."""
    dx = torch.empty_like(x)
    library.train_norm_backward(
        *(dy.data_ptr(), x.data_ptr(), weight.data_ptr(), factors.data_ptr(), dx.data_ptr()),
        *(len(factors), x.shape[-1], offset),
    )
    return dx


def gated(library: CDLL, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up."""
    y = torch.empty_like(gate)
    library.train_gated_forward(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
    return y


def gated_gradients(
    library: CDLL, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    library.train_gated_backward(
        *(dy.data_ptr(), gate.data_ptr(), up.data_ptr(), d_gate.data_ptr(), d_up.data_ptr(), gate.numel())
    )
    return d_gate, d_up


def turned(
    library: CDLL, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """Returns x turned by its tokens' angles, or back.

    Args:
        x: [rows, tokens, heads, d].
        cos, sin: [rows or 1, tokens, d]; the two halves of the last axis are equal.
    """
    y = torch.empty_like(x)
    rows, tokens, heads, d = x.shape
    library.train_turn(
        *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), rows * tokens, heads, d, len(cos) * tokens),
        -1.0 if inverse else 1.0,
    )
    return y


def losses(
    library: CDLL, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the cross-entropy of each row, and what belongs to it.

    Args:
        logits: [rows, d], with contiguous rows.
        labels: int64 [rows].
        weights: float32 [rows].

    Returns:
        float32 [rows]: -weight log softmax(logits)[label]; float32 [rows]: the weight where the label has the first of
        the largest logits, else 0; the gradient of the losses' sum, or None.
    """
    rows, d = logits.shape
    own, hits = torch.empty_like(weights), torch.empty_like(weights)
    gradient = logits.new_empty(rows, d) if with_gradient else None
    library.train_losses(
        *(logits.data_ptr(), logits.stride(0), labels.data_ptr(), weights.data_ptr(), own.data_ptr()),
        *(hits.data_ptr(), None if gradient is None else gradient.data_ptr(), rows, d),
    )
    return own, hits, gradient
