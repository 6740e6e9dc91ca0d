"""The decoder's operations other than its linears, over a library of the native kernels.

Each does what `Backend` says, for tensors of the library's element type; `library` has the argument types of
`SIGNATURES`.
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
from loramill.kernels.memory import host_memory
from loramill.kernels.paging import COUNT, START, Pages

#: Positions of a group of keys.
_LANES = 16
#: As in the C sources: the largest head, and queries that share a pass over the keys.
_MAX_HEAD, _QUERIES = 256, 48
#: Counts and strides are declared as pointers too: ctypes takes an int for those three times as fast as for c_int64.
SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [*[c_void_p] * 8, c_float],
    "add_rms_norm": [*[c_void_p] * 8, c_float],
    "silu_mul": [c_void_p] * 5,
    "rope_write": [c_void_p] * 12,
    "attention": [*[c_void_p] * 14, c_float, c_void_p],
}


def rms_norm(library: ctypes.CDLL, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norms the last of x [..., d]."""
    if x.dim() > 3:
        return rms_norm(library, x.flatten(0, -3), weight, eps).view(x.shape)
    _check(x, weight, x.shape[-1:])
    y = torch.empty(x.shape, dtype=x.dtype)
    groups, members, d = (1, 1, 1, *x.shape)[-3:]
    ld_group, ld_member, _ = (0, 0, 0, *x.stride())[-3:]
    library.rms_norm(
        x.data_ptr(), groups, members, ld_group, ld_member, weight.data_ptr(), y.data_ptr(), d, eps
    )  # fmt: skip
    return y


def add_rms_norm(
    library: ctypes.CDLL, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x [rows, d] to the residual in place and norms that."""
    rows, d = shape = x.shape
    _check(residual, x, shape)
    _check(x, weight, (d,))
    y = torch.empty(shape, dtype=x.dtype)
    library.add_rms_norm(
        residual.data_ptr(), residual.stride()[0], x.data_ptr(), x.stride()[0], weight.data_ptr(), y.data_ptr(), rows, d,
        eps,
    )  # fmt: skip
    return y


def silu_mul(library: ctypes.CDLL, gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for gate_up [rows, 2 d]."""
    rows, both = gate_up.shape
    ld, step = gate_up.stride()
    if step != 1:
        raise _strided(gate_up)
    y = torch.empty(rows, both // 2, dtype=gate_up.dtype)
    library.silu_mul(gate_up.data_ptr(), ld, y.data_ptr(), rows, both // 2)
    return y


def new_kv(
    layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[LayerKV, ...]:
    """Keys and values in the layout of attention.c.

    Raises:
        EngineFault: `block_size` is no multiple of 16, or `head_dim` is odd or larger than 256.
    """
    if block_size % _LANES or head_dim % 2 or not 2 <= head_dim <= _MAX_HEAD:
        raise EngineFault(
            f"Blocks of {block_size} positions and heads of {head_dim}: the native kernels need a multiple of {_LANES} "
            f"and an even number up to {_MAX_HEAD}."
        )
    pair, width = 4 // dtype.itemsize, -(-head_dim // _LANES) * _LANES
    of_keys = (blocks, kv_heads, block_size // _LANES, head_dim // pair, _LANES, pair)
    of_values = (blocks, kv_heads, block_size // pair, width, pair)
    sizes = [prod(of_keys) * dtype.itemsize, prod(of_values) * dtype.itemsize]
    memory = host_memory(layers * sum(sizes))
    parts = iter(memory.split(sizes * layers))
    return tuple(
        LayerKV(
            next(parts).view(dtype).view(of_keys), next(parts).view(dtype).view(of_values), block_size, kv_heads, head_dim
        )
        for _ in range(layers)
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
    pages.check(rows, len(kv.keys), kv.block_size)
    angles = (rows, kv.head_dim // 2)
    if columns != (heads + 2 * kv.kv_heads) * kv.head_dim or qkv.stride()[1] != 1:
        raise _strided(qkv)
    if not (cos.shape == sin.shape == angles and cos.is_contiguous() and sin.is_contiguous()):
        raise EngineFault(f"cos {list(cos.shape)} and sin {list(sin.shape)} must be contiguous, {list(angles)}.")
    library.rope_write(
        qkv.data_ptr(), qkv.stride()[0], rows, heads, kv.kv_heads, kv.head_dim, cos.data_ptr(), sin.data_ptr(),
        kv.keys.data_ptr(), kv.values.data_ptr(), _addresses(pages).slots, kv.block_size,
    )  # fmt: skip


def attention(
    library: ctypes.CDLL,
    qkv: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Each row's queries over its sequence's keys; returns [rows, heads * head_dim]."""
    rows = qkv.shape[0]
    pages.check(rows, len(kv.keys), kv.block_size)
    ld, step = qkv.stride()
    if step != 1 or heads % kv.kv_heads:
        raise _strided(qkv)
    at, units = _addresses(pages), _units(pages, heads // kv.kv_heads)
    y = torch.empty(rows, heads * kv.head_dim, dtype=qkv.dtype)
    library.attention(
        qkv.data_ptr(), ld, y.data_ptr(), kv.keys.data_ptr(), kv.values.data_ptr(), at.blocks, at.table, units.address,
        units.count, heads, kv.kv_heads, kv.head_dim, kv.block_size, _UNLIMITED if window is None else window, scale,
        units.scores * kv.head_dim,
    )  # fmt: skip
    return y


_UNLIMITED = 1 << 40


def _check(x: torch.Tensor, weight: torch.Tensor, shape: tuple[int, ...]) -> None:
    if x.stride()[-1] != 1 or weight.stride()[-1] != 1 or weight.shape != shape or weight.dtype != x.dtype:
        raise EngineFault(
            f"{x.dtype} {list(x.shape)} of strides {x.stride()} meets {weight.dtype} {list(weight.shape)} of strides "
            f"{weight.stride()}; {list(shape)} of one type was expected, and rows without gaps."
        )


def _strided(x: torch.Tensor) -> EngineFault:
    return EngineFault(f"{list(x.shape)} of strides {x.stride()} has gaps in its rows, or is of other heads.")


@dataclass(frozen=True, slots=True)
class _Addresses:
    """Where the arrays of `Pages` are."""

    blocks: int
    table: int
    slots: int


def _addresses(pages: Pages) -> _Addresses:
    found = pages.memo.get(_Addresses)
    if found is None:
        found = _Addresses(*(array.ctypes.data for array in (pages.blocks, pages.table, pages.slots)))
        pages.memo[_Addresses] = found
    assert isinstance(found, _Addresses)
    return found


@dataclass(frozen=True, slots=True)
class _Units:
    """How attention is shared out; `address` is that of int32 [count, 3] in `numbers`: span, first and last query + 1.

    Attributes:
        scores: products of a query and a key, of an average unit at one KV head.
    """

    numbers: NDArray[np.int32]
    address: int
    count: int
    scores: int


def _units(pages: Pages, group: int) -> _Units:
    found = pages.memo.get((_Units, group))
    if found is None:
        queries = pages.table[:, COUNT] * group
        pieces = -(-queries // _QUERIES)
        span = np.repeat(np.arange(len(queries)), pieces)
        piece = np.arange(len(span)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        # Pieces of nearly equal size.
        cuts = [queries[span] * (piece + end) // pieces[span] for end in (0, 1)]
        numbers = np.stack([span, *cuts], axis=1).astype(np.int32)
        scores = int((queries * (pages.table[:, START] + pages.table[:, COUNT] / 2)).sum() * 2 / max(1, len(numbers)))
        found = pages.memo[_Units, group] = _Units(numbers, numbers.ctypes.data, len(numbers), scores)
    assert isinstance(found, _Units)
    return found
