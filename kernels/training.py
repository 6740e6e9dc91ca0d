"""The training counterpart of `lora`: trains several adapters at once on one frozen linear, each as if alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from loramill.errors import AdapterInvalid, EngineFault
from loramill.kernels import backend
from loramill.kernels.adapter_rows import DROPOUT_STEPS, AdapterRows, Frozen
from loramill.kernels.adapter_rows import dense as _dense
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.cpu.native import Native
from loramill.kernels.cpu.training_lora import native_lora
from loramill.kernels.products import linear, product


@dataclass(frozen=True, slots=True)
class Trainable:
    """One adapter's parameters at one linear.

    Attributes:
        a: [r, d_in].
        b: [d_out, r], of a's dtype.
        scale: Factor of the delta: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).
        dropout: Probability that an element of x is dropped for the adapter, rounded to multiples of 1 / DROPOUT_STEPS.
        seed: Seed of the dropout; see `dropout_seed`.
        dtype: In which the adapter computes; None: a's. Gradients are computed in that dtype and returned in a's.
        cast: a and b in that dtype. One cast serves all passes until a and b change; without one, each pass casts.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float = 0.0
    seed: int = 0
    dtype: torch.dtype | None = None
    cast: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype in which the adapter computes."""
        return self.cast[0].dtype if self.cast is not None else self.dtype or self.a.dtype

    def computed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a and b in the dtype in which the adapter computes."""
        if self.cast is not None or self.computes_in == self.a.dtype:
            return self.cast or (self.a, self.b)
        with torch.no_grad():
            return self.a.to(self.computes_in), self.b.to(self.computes_in)


def dropout_seed(adapter: str, step: int, site: str) -> int:
    """The seed of an adapter's dropout at one linear in one forward pass.

    Args:
        adapter: Identifies the adapter; the seed is independent of the other adapters.
        step: The step of the adapter's own training; with gradient accumulation, counted in micro-batches.
        site: Name of the linear.
    """
    return int.from_bytes(hashlib.blake2b(repr((adapter, step, site)).encode(), digest_size=8).digest(), "big")


def grouped_lora(
    x: torch.Tensor,
    base: Frozen,
    adapters: Mapping[Slot, Trainable],
    batch: Batch,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A frozen linear, with LoRA on the rows of each adapter; differentiable once, in x, a and b.

    With `rows` all rows of an adapter in their order, a and b in the dtype in which it computes, x_a = x[rows] in that
    dtype, p its dropout, and a generator of x's device:

        y = F.linear(x, base, bias)
        words = torch.empty(ceil(x_a.numel() / 4), dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator.manual_seed(seed))
        kept = words.view(torch.int16)[: x_a.numel()].view_as(x_a) >= p * 2**16 - 2**15
        y[rows] += (x_a * kept / (1 - p)) @ a.T @ b.T * scale

    (LoRA: arXiv 2106.09685, equation 3.) An adapter's delta, and the gradients of a and b, depend only on its own rows
    of x and dy, its parameters and its seed: a NaN in one adapter reaches no other. Rows without a slot, or whose slot
    is not in `adapters`, equal the base's output bit for bit. Products are in the given dtypes, also within autocast.
    Works under `torch.utils.checkpoint`. Does not train DoRA's gain.

    Args:
        x: [rows, d_in].
        base: The frozen weight [d_out, d_in], of x's dtype.
        adapters: The adapters that target this linear; one without rows gets no gradient (None, not zeros).
        batch: The adapter of each row.
        bias: [d_out], frozen, of x's dtype.

    Returns:
        y, [rows, d_out], of x's dtype.

    Raises:
        AdapterInvalid: An adapter's shapes, dtypes or dropout are invalid.
        EngineFault: x, base and batch do not match, or the base is not frozen.
    """
    with torch.no_grad():
        dense = _dense(base)
    _check_base(x, dense, bias, batch)
    chosen = [(adapters[slot], slot, own) for slot, own in batch.rows_of_slots.items() if slot in adapters]
    library = _library_for(x, [adapter for adapter, _, _ in chosen])
    parts: list[AdapterRows] = []
    weights: list[torch.Tensor] = []
    for adapter, slot, own in chosen:
        _check_adapter(slot, adapter, dense)
        dropped = round(adapter.dropout * DROPOUT_STEPS)
        parts.append(AdapterRows(own, adapter.scale / (1 - dropped / DROPOUT_STEPS), dropped, adapter.seed))
        weights += (adapter.a, adapter.b) if library else (adapter.a, adapter.b, *adapter.computed())
    if library is not None:
        return native_lora(library, x, dense, base, bias, parts, weights)
    y: torch.Tensor = _GroupedLora.apply(x, dense, base, bias, parts, *weights)  # type: ignore[no-untyped-call]
    return y


def native_library(device: torch.device, dtype: torch.dtype) -> CDLL | None:
    """Returns the native kernels that compute training's operations: on a CPU, in bfloat16; or None.

    They round an adapter's float32 weights as they read them: adapters need no casts then.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    kernels = backend("cpu")
    return kernels.training_library(dtype) if isinstance(kernels, Native) else None


def _library_for(x: torch.Tensor, adapters: Sequence[Trainable]) -> CDLL | None:
    library = native_library(x.device, x.dtype)
    native = bool(adapters) and all(
        each.computes_in == x.dtype and each.a.dtype in (x.dtype, torch.float32) for each in adapters
    )
    return library if native else None


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dense: torch.Tensor,
        base: Frozen,
        bias: torch.Tensor | None,
        parts: Sequence[AdapterRows],
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        # The base is not a saved tensor: hooks on those (offloading) would copy it for every linear and step.
        ctx.base, ctx.parts, ctx.dtypes = base, parts, [a.dtype for a in weights[::4]]
        saved = [x if any(ctx.needs_input_grad[5::4]) else None]
        with torch.autocast(x.device.type, enabled=False):
            y = linear(x, dense, bias)
            for part, a, b in zip(parts, weights[2::4], weights[3::4], strict=True):
                own = part.take(x, a.dtype)
                h = _scaled_product(_masked(own, part.kept(len(own), x.shape[1], x.device)), a.T, part.scale)
                part.add_product(y, h, b.T)
                saved += (a, b, h)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        grads: list[torch.Tensor | None] = []
        with torch.autocast(dy.device.type, enabled=False):
            dx = product(dy, _dense(ctx.base)) if ctx.needs_input_grad[0] else None
            for i, part in enumerate(ctx.parts):
                a, b, h = saved[3 * i : 3 * i + 3]
                needs_a, needs_b = ctx.needs_input_grad[5 + 4 * i : 7 + 4 * i]
                own = part.take(dy, b.dtype)
                da = db = None
                if needs_b:
                    db = (own.T @ h).to(ctx.dtypes[i])
                if needs_a or dx is not None:
                    dh = _scaled_product(own, b, part.scale)
                    kept = part.kept(len(dh), a.shape[1], a.device)
                    if needs_a:
                        da = (dh.T @ _masked(part.take(x, a.dtype), kept)).to(ctx.dtypes[i])
                    if dx is not None and kept is None:
                        part.add_product(dx, dh, a)
                    elif dx is not None:
                        part.add(dx, dh @ a * kept)
                grads += (da, db, None, None)
        return (dx, None, None, None, None, *grads)


def _masked(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return x if kept is None else x * kept


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """left @ right * scale. On a GPU it is one launch, in which only the result is rounded."""
    if left.device.type == "cpu":
        return (left @ right).mul_(scale)
    return _product_in_one(left, right, scale)


def _product_in_one(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    # With beta = 0 the first argument is not read.
    return torch.addmm(_unread(left.dtype, left.device), left, right, beta=0, alpha=scale)


@lru_cache
def _unread(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _check_base(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None, batch: Batch) -> None:
    if x.ndim != 2 or x.shape[0] != batch.rows:
        raise EngineFault(f"x is {list(x.shape)}, but the batch has {batch.rows} rows; pass x as [rows, d_in].")
    if dense.ndim != 2 or dense.shape[1] != x.shape[1] or dense.dtype != x.dtype:
        raise EngineFault(
            f"The base is {list(dense.shape)} {dense.dtype} and x {list(x.shape)} {x.dtype}; the base must be "
            "[d_out, d_in] of x's dtype, or a function that returns that if it is quantized."
        )
    if bias is not None and (bias.shape != dense.shape[:1] or bias.dtype != x.dtype):
        raise EngineFault(f"The bias is {list(bias.shape)} {bias.dtype}; it must be [{dense.shape[0]}] {x.dtype}.")
    if dense.requires_grad or (bias is not None and bias.requires_grad):
        raise EngineFault("The base requires a gradient, but only adapters are trained here; freeze weight and bias.")


def _check_adapter(slot: Slot, adapter: Trainable, dense: torch.Tensor) -> None:
    a, b = adapter.a, adapter.b
    d_out, d_in = dense.shape
    if a.ndim != 2 or len(a) < 1 or a.shape[1] != d_in or b.shape != (d_out, len(a)):
        raise AdapterInvalid(
            f"A is {list(a.shape)} and B {list(b.shape)} in slot {slot.index}; this linear needs [r, {d_in}] and "
            f"[{d_out}, r], with a rank r above 0."
        )
    if a.dtype != b.dtype or not a.is_floating_point():
        raise AdapterInvalid(f"A is {a.dtype} and B {b.dtype} in slot {slot.index}; give both one floating dtype.")
    if adapter.cast is not None and [each.shape for each in adapter.cast] != [a.shape, b.shape]:
        raise AdapterInvalid(f"The cast of A and B in slot {slot.index} has other shapes; cast them again.")
    if not 0 <= adapter.dropout <= 1 - 1 / DROPOUT_STEPS:
        raise AdapterInvalid(
            f"The dropout of slot {slot.index} is {adapter.dropout}; it must be 0 or more and below 1."
        )
