"""The decoder's operations other than its linears, over a library of the native kernels.

Each implements the operation of `Backend` with its name, for tensors of the library's element type; `library` has the
argument types of `SIGNATURES`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels.backend import LayerKV
from loramill.kernels.memory import ALIGNMENT, HUGE_PAGE, host_memory
from loramill.kernels.paging import COUNT, START, Pages

#: Number of positions in a group of keys.
_LANES = 16
#: As in the C sources: the largest head, and the number of queries that share a pass over the keys.
_MAX_HEAD, _QUERIES = 256, 48
#: Counts and strides are declared as pointers too: ctypes takes an int for those three times as fast as for c_int64.
SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [*[c_void_p] * 8, c_float],
    "add_rms_norm": [*[c_void_p] * 8, c_float],
    "silu_mul": [c_void_p] * 5,
    "rope_write": [c_void_p] * 12,
    "attention": [*[c_void_p] * 14, c_float, c_float, c_void_p],
}


def rms_norm(library: ctypes.CDLL, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalizes the last axis of x [..., d]."""
    if x.dim() == 2:
        (rows, d), (ld, step) = x.shape, x.stride()
        members, ld_member = 1, 0
    elif x.dim() == 3:
        (rows, members, d), (ld, ld_member, step) = x.shape, x.stride()
    else:
        return rms_norm(library, x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    if step != 1 or weight.dtype != x.dtype or weight.shape != (d,) or not weight.is_contiguous():
        raise _mismatch(x, weight)
    y = x.new_empty(*x.shape)
    library.rms_norm(x.data_ptr(), rows, members, ld, ld_member, weight.data_ptr(), y.data_ptr(), d, eps)
    return y


def add_rms_norm(
    library: ctypes.CDLL, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x [rows, d] to the residual in place and normalizes the sum."""
    (rows, d), (ldx, step) = x.shape, x.stride()
    ld, residual_step = residual.stride()
    if step != 1 or residual_step != 1 or residual.dtype != x.dtype or residual.shape != (rows, d):
        raise _mismatch(x, residual)
    if weight.dtype != x.dtype or weight.shape != (d,) or not weight.is_contiguous():
        raise _mismatch(x, weight)
    y = x.new_empty(rows, d)
    library.add_rms_norm(
        residual.data_ptr(), ld, x.data_ptr(), ldx, weight.data_ptr(), y.data_ptr(), rows, d, eps
    )  # fmt: skip
    return y


def silu_mul(library: ctypes.CDLL, gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for gate_up [rows, 2 d]."""
    rows, both = gate_up.shape
    ld, step = gate_up.stride()
    if step != 1:
        raise _mismatch(gate_up, gate_up)
    y = gate_up.new_empty(rows, both // 2)
    library.silu_mul(gate_up.data_ptr(), ld, y.data_ptr(), rows, both // 2)
    return y


def new_kv(
    layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[LayerKV, ...]:
    """Keys and values in the layout of attention.c.

    Raises:
        EngineFault: `block_size` is not a multiple of 16, or `head_dim` is odd or larger than 256.
    """
    if block_size % _LANES or head_dim % 2 or not 2 <= head_dim <= _MAX_HEAD:
        raise EngineFault(
            f"Blocks of {block_size} positions and heads of {head_dim}: the native kernels need a multiple of {_LANES} "
            f"and an even number up to {_MAX_HEAD}."
        )
    pair, width = 4 // dtype.itemsize, -(-head_dim // _LANES) * _LANES
    of_keys = (blocks, kv_heads, block_size // _LANES, head_dim // pair, _LANES, pair)
    of_values = (blocks, kv_heads, block_size // pair, width, pair)
    # Each starts at another offset in its huge page: else a step that fills one fills all of them, and getting new ones
    # takes 0.3 s.
    gap = HUGE_PAGE // (2 * layers) // ALIGNMENT * ALIGNMENT
    sizes = [prod(of_keys) * dtype.itemsize, gap, prod(of_values) * dtype.itemsize, gap]
    parts = torch.split(host_memory(layers * sum(sizes)), sizes * layers)
    return tuple(
        LayerKV(keys.view(dtype).view(of_keys), values.view(dtype).view(of_values), block_size, kv_heads, head_dim)
        for keys, values in zip(parts[::4], parts[2::4], strict=True)
    )


def rope_write(
    library: ctypes.CDLL,
    qkv: torch.Tensor,
    heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKV,
    pages: Pages,
) -> None:
    """Rotates queries in place; rotates keys and writes them, and the values, to their pages."""
    rows, columns = qkv.shape
    pages.check(rows, kv.keys.shape[0], kv.block_size)
    angles = (rows, kv.head_dim // 2)
    ld, step = qkv.stride()
    if step != 1 or columns != (heads + 2 * kv.kv_heads) * kv.head_dim or qkv.dtype != kv.keys.dtype:
        raise _mismatch(qkv, kv.keys)
    for angle in (cos, sin):
        if angle.shape != angles or angle.dtype != torch.float32 or not angle.is_contiguous():
            raise _mismatch(qkv, angle)
    library.rope_write(
        qkv.data_ptr(), ld, rows, heads, kv.kv_heads, kv.head_dim, cos.data_ptr(), sin.data_ptr(),
        kv.keys.data_ptr(), kv.values.data_ptr(), slot_address(pages), kv.block_size,
    )  # fmt: skip


def attention(
    library: ctypes.CDLL,
    qkv: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of each row to its sequence's positions; returns [rows, heads * head_dim]."""
    rows, columns = qkv.shape
    pages.check(rows, kv.keys.shape[0], kv.block_size)
    ld, step = qkv.stride()
    if step != 1 or heads % kv.kv_heads or columns < heads * kv.head_dim or qkv.dtype != kv.keys.dtype:
        raise _mismatch(qkv, kv.keys)
    plan = attention_plan(pages, heads // kv.kv_heads)
    y = qkv.new_empty(rows, heads * kv.head_dim)
    library.attention(
        qkv.data_ptr(), ld, y.data_ptr(), kv.keys.data_ptr(), kv.values.data_ptr(), plan.blocks, plan.spans,
        plan.address, plan.count, heads, kv.kv_heads, kv.head_dim, kv.block_size,
        UNLIMITED if window is None else window, scale, cap or 0.0, plan.scores * kv.head_dim,
    )  # fmt: skip
    return y


#: The window of a layer without one.
UNLIMITED = 1 << 40


def _mismatch(x: torch.Tensor, other: torch.Tensor) -> EngineFault:
    return EngineFault(
        f"{x.dtype} {list(x.shape)} with strides {x.stride()} and {other.dtype} {list(other.shape)} with strides "
        f"{other.stride()} don't match: the kernels need equal dtypes, matching sizes and contiguous rows."
    )


def slot_address(pages: Pages) -> int:
    """The address of `pages.slots`."""
    address = pages.memo.get(slot_address)
    if address is None:
        address = pages.memo[slot_address] = pages.slots.ctypes.data
    return int(address)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How attention is divided among threads.

    Attributes:
        units: int32 [count, 3]: span, first query, query after the last; each unit is one part of work per KV head.
        address: Address of the units.
        blocks: Address of `Pages.blocks`.
        spans: Address of `Pages.table`.
        count: Number of units.
        scores: Number of products of a query and a key in an average part, and as many of a probability and a value.
    """

    units: NDArray[np.int32]
    address: int
    blocks: int
    spans: int
    count: int
    scores: int


def attention_plan(pages: Pages, group: int) -> AttentionPlan:
    """The plan of a step in which `group` query heads share a KV head."""
    plan = pages.memo.get((AttentionPlan, group))
    if plan is None:
        queries = pages.table[:, COUNT].astype(np.int64) * group
        pieces = -(-queries // _QUERIES)
        span = np.repeat(np.arange(len(queries)), pieces)
        piece = np.arange(len(span)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        # Pieces of nearly equal size.
        cuts = [queries[span] * (piece + end) // pieces[span] for end in (0, 1)]
        units = np.stack([span, *cuts], axis=1).astype(np.int32)
        scores = int((queries * (pages.table[:, START] + pages.table[:, COUNT] / 2)).sum() * 2 / max(1, len(units)))
        plan = AttentionPlan(
            units, units.ctypes.data, pages.blocks.ctypes.data, pages.table.ctypes.data, len(units), scores
        )
        pages.memo[AttentionPlan, group] = plan
    assert isinstance(plan, AttentionPlan)
    return plan
