"""The products of a base in training.

A CPU without instructions for bfloat16 multiplies such matrices five times slower than the same numbers in float32: 512
rows of SmolLM2's up_proj take 30 ms in bfloat16, and 7 ms with x, weight and result converted each time. On those, the
products are computed in float32, and their results are rounded. No converted weight is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

#: From this number of rows, MKL gives a row the same float32 bits whatever the other rows are (measured with 1 to 512
#: rows, widths 16 to 1,536, AVX-512).
_ROWS = 16
#: Elements of a weight, and rows, that are converted at once: they and their product take little memory next to a pass.
_ELEMENTS = 2**20
_BLOCK_ROWS = 256


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias, without a gradient.

    Args:
        x: [rows, d_in].
        weight: [d_out, d_in], of x's dtype.
        bias: [d_out], of x's dtype.
    """
    if not _is_slow(x):
        return F.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    for some in _slices(weight):
        wide = _kept.weight(weight[some])
        for rows in _blocks(x):
            total = torch.mm(_kept.rows(x[rows]), wide.T, out=_kept.total(len(x[rows]), len(wide)))
            y[rows, some] = (total if bias is None else total.add_(bias[some]))[: len(x[rows])]
    return y


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left @ right, of [rows, d] and [d, columns] or of batches of such, without a gradient."""
    if not _is_slow(left):
        return left @ right
    if left.ndim > 2:
        results = left.new_empty(*left.shape[:-1], right.shape[-1])
        for result, *factors in zip(*(each.flatten(0, -3) for each in (results, left, right)), strict=True):
            result.copy_(product(*factors))
        return results
    y = left.new_empty(len(left), right.shape[1])
    for rows in _blocks(left):
        total = _kept.total(len(left[rows]), right.shape[1]).zero_()
        for some in _slices(right):
            total.addmm_(_kept.rows(left[rows, some]), _kept.weight(right[some]))
        y[rows] = total[: len(left[rows])]
    return y


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias for x [..., d_in], with a gradient in x alone, once."""
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _FrozenLinear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def computes_in_float32(dtype: torch.dtype) -> bool:
    """Whether a CPU's products of matrices of this dtype are computed in float32."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _lacks_bfloat16())


class _Kept(threading.local):
    """A thread's float32 copies. They are kept, since malloc would leave gaps of their sizes between other tensors."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A part of a weight."""
        return self._buffer("weight", *weight.shape).copy_(weight)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of a pass, at least `_ROWS`: the others are zeros."""
        wide = self._buffer("rows", max(_ROWS, len(x)), x.shape[1])
        wide[: len(x)] = x
        wide[len(x) :] = 0
        return wide

    def total(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for a product of `rows`."""
        return self._buffer("total", max(_ROWS, rows), columns)

    def _buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers[name] = buffer = torch.empty(rows * columns, dtype=torch.float32)
        return buffer[: rows * columns].view(rows, columns)


_kept = _Kept()


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


def _blocks(x: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, len(x), _BLOCK_ROWS))
