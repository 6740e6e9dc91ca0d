"""A frozen linear with adapters in training by the native kernels: one call for all adapters' products."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ctypes import CDLL, c_void_p
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from loramill.kernels.adapter_rows import AdapterRows, Frozen, dense
from loramill.kernels.products import linear, product

#: Arguments of the functions of training_lora.c; counts are declared as in `decoder_ops`.
SIGNATURES: dict[str, list[Any]] = {"train_forward": [c_void_p] * 4, "train_backward": [c_void_p] * 4}
#: Ranks of h are padded to a multiple of this.
_RANKS = 4


def native_lora(
    library: CDLL,
    x: torch.Tensor,
    weight: torch.Tensor,
    base: Frozen,
    bias: torch.Tensor | None,
    parts: Sequence[AdapterRows],
    factors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`grouped_lora` for x in the element type of a library; a and b are of that type, or of float32 and rounded to it.

    An adapter's bits are the same whatever the other adapters and the number of threads are.

    Args:
        weight: base as a tensor [d_out, d_in].
        factors: a and b of each part.
    """
    y: torch.Tensor = _NativeLora.apply(library, x, weight, base, bias, parts, *factors)  # type: ignore[no-untyped-call]
    return y


class _NativeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: CDLL,
        x: torch.Tensor,
        weight: torch.Tensor,
        base: Frozen,
        bias: torch.Tensor | None,
        parts: Sequence[AdapterRows],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            y = linear(x, weight, bias)
        call, of_x, of_y = _Call(), _Matrix(x), _Matrix(y)
        h = x.new_empty(sum(part.count * _padded(len(a)) for part, a in zip(parts, factors[::2], strict=True)))
        at = h.data_ptr()
        for part, a, b in zip(parts, factors[::2], factors[1::2], strict=True):
            call.add(part, a, b, call.rows(of_x, part, part.kept(part.count, x.shape[1], x.device)), at, of_y)
            at += part.count * _padded(len(a)) * h.itemsize
        call.run(library.train_forward, x.shape[1], y.shape[1])
        ctx.native, ctx.base, ctx.parts = library, base, parts
        # The base is not a saved tensor: hooks on those (offloading) would copy it for every linear and step.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[6:]) else None, h, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, *factors = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            dx = product(dy, dense(ctx.base)) if ctx.needs_input_grad[1] else None
        call, of_dy = _Call(), _Matrix(dy)
        of_x = None if x is None else _Matrix(x)
        of_dx = None if dx is None else _Matrix(dx)
        grads = [
            torch.empty(each.shape, dtype=torch.float32) if needed else None
            for each, needed in zip(factors, ctx.needs_input_grad[6:], strict=True)
        ]
        at = h.data_ptr()
        for i, part in enumerate(ctx.parts):
            a, b = factors[2 * i : 2 * i + 2]
            mask = part.kept(part.count, a.shape[1], a.device)
            own = (0, 0) if of_x is None else call.rows(of_x, part, mask)
            call.add(part, a, b, own, at, of_dy, of_dx, mask, *grads[2 * i : 2 * i + 2])
            at += part.count * _padded(len(a)) * h.itemsize
        call.run(ctx.native.train_backward, factors[0].shape[1], dy.shape[1])
        found = (None if grad is None else grad.to(each.dtype) for grad, each in zip(grads, factors, strict=True))
        return None, dx, None, None, None, None, *found


class _Matrix:
    """Rows of a pass, and where they begin in memory."""

    __slots__ = ("address", "stride", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
        self.address, self.stride = self.tensor.data_ptr(), self.tensor.stride(0)


@dataclass(slots=True)
class _Call:
    """Arguments of one call.

    Attributes:
        numbers: of `trained` of training_lora.c, adapter after adapter.
        alive: tensors that the numbers are addresses of.
        copies: copies of rows that the call changes, and where they are copied back to.
    """

    numbers: list[float] = field(default_factory=list)
    alive: list[torch.Tensor] = field(default_factory=list)
    copies: list[tuple[AdapterRows, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    count: int = 0

    def rows(
        self, matrix: _Matrix, part: AdapterRows, mask: torch.Tensor | None = None, *, changed: bool = False
    ) -> tuple[int, int]:
        """Address and stride of an adapter's rows, which are copied if they are masked or not next to each other."""
        if mask is None and len(part.rows) == 1:
            return matrix.address + part.rows[0].start * matrix.stride * matrix.tensor.itemsize, matrix.stride
        own = part.take(matrix.tensor, matrix.tensor.dtype)
        own = own if mask is None else own * mask
        self.alive.append(own)
        if changed:
            self.copies.append((part, matrix.tensor, own))
        return own.data_ptr(), own.stride(0)

    def add(
        self,
        part: AdapterRows,
        a: torch.Tensor,
        b: torch.Tensor,
        x: tuple[int, int],
        h: int,
        y: _Matrix,
        dx: _Matrix | None = None,
        mask: torch.Tensor | None = None,
        da: torch.Tensor | None = None,
        db: torch.Tensor | None = None,
    ) -> None:
        """Adds an adapter. Without dx, da and db, y is changed; else dx is."""
        backward = dx is not None or da is not None or db is not None
        y_at, ldy = self.rows(y, part, changed=not backward)
        dx_at, lddx = (0, 0) if dx is None else self.rows(dx, part, changed=True)
        a, b = (each if each.is_contiguous() else each.contiguous() for each in (a, b))
        self.alive += (a, b) if mask is None else (a, b, mask)
        self.numbers += (
            *(x[0], a.data_ptr(), b.data_ptr(), y_at, h, dx_at),
            *(0 if each is None else each.data_ptr() for each in (mask, da, db)),
            *(part.count, x[1], ldy, lddx, len(a), a.dtype == torch.float32, part.scale),
        )
        self.count += 1

    def run(self, function: Callable[..., int], d_in: int, d_out: int) -> None:
        """Calls `train_forward` or `train_backward`.

        Raises:
            MemoryError: temporary buffers can't be allocated.
        """
        if function(_layout(self.count).pack(*self.numbers), self.count, d_in, d_out):
            raise MemoryError
        for part, whole, own in self.copies:
            part.put_back(whole, own)


def _padded(rank: int) -> int:
    return -(-rank // _RANKS) * _RANKS


@lru_cache
def _layout(count: int) -> struct.Struct:
    return struct.Struct("15qd" * count)
