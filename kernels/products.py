"""The products of a base in training.

A CPU without instructions for bfloat16 multiplies such matrices five times slower than the same numbers in float32: 512
rows of SmolLM2's up_proj take 30 ms in bfloat16, and 7 ms with x, weight and result converted each time. On those, the
products are computed in float32, and their results are rounded. Converted weights are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

#: From this number of rows, MKL gives a row the same float32 bits whatever the other rows are (measured with 1 to 512
#: rows, widths 16 to 1,536, AVX-512).
_ROWS = 16
#: Elements of a weight that are converted at once: 16 MiB.
_ELEMENTS = 2**22


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias, without a gradient.

    Args:
        x: [rows, d_in].
        weight: [d_out, d_in], of x's dtype.
        bias: [d_out], of x's dtype.
    """
    if not _is_slow(x):
        return F.linear(x, weight, bias)
    wide, y = _widened(x), x.new_empty(len(x), len(weight))
    for some in _slices(weight):
        part = F.linear(wide, weight[some].float(), None if bias is None else bias[some].float())
        y[:, some] = part[: len(x)]
    return y


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left @ right, of [rows, d] and [d, columns] or of batches of such, without a gradient."""
    if not _is_slow(left):
        return left @ right
    if left.ndim > 2:
        return (left.float() @ right.float()).to(left.dtype)
    total = left.new_zeros(max(len(left), _ROWS), right.shape[1], dtype=torch.float32)
    for some in _slices(right):
        total.addmm_(_widened(left[:, some]), right[some].float())
    return total[: len(left)].to(left.dtype)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias for x [..., d_in], with a gradient in x alone, once."""
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _FrozenLinear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def computes_in_float32(dtype: torch.dtype) -> bool:
    """Whether a CPU's products of matrices of this dtype are computed in float32."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _lacks_bfloat16())


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The weight is not a saved tensor: hooks on those (offloading) would copy it for every linear and step.
        ctx.weight = weight
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return product(dy, ctx.weight), None, None


def _is_slow(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _lacks_bfloat16()


@lru_cache
def _lacks_bfloat16() -> bool:
    """Whether the processor is an x86-64 without instructions that multiply bfloat16."""
    features = torch.cpu.get_capabilities()
    return features["architecture"] == "x86_64" and not (features.get("avx512_bf16") or features.get("amx_bf16"))


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of a weight's rows, each with at most `_ELEMENTS` elements if rows are not longer."""
    step = max(1, _ELEMENTS // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _widened(x: torch.Tensor) -> torch.Tensor:
    """x [rows, d] in float32, with as many rows of zeros as `_ROWS` wants."""
    return F.pad(x.float(), (0, 0, 0, max(0, _ROWS - len(x))))
