"""The decoder's operations other than linears and attention on a GPU, each in one launch; see `Backend` for them.

Nothing is read back by the host, so all of them can be captured into CUDA graphs.
"""

from __future__ import annotations

from functools import cache

import torch
import triton

from loramill.errors import EngineFault
from loramill.kernels.backend import Activation, HeadNorms, LayerKV
from loramill.kernels.paging import Pages
from loramill.kernels.triton.decoder_kernels import gate_row, norm_row, rotate_heads
from loramill.kernels.triton.plans import Launch

#: Number of columns of a program of `gate_row`, and of elements of the heads of a program of `rotate_heads`: 8 per
#: thread, 16 bytes of bfloat16 per load.
COLUMNS, HEAD_ELEMENTS = 1024, 1024


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Normalizes the last axis of x [..., d]."""
    rows = x.reshape(-1, x.shape[-1])
    return _norm(rows, None, None, weight, eps, offset).view(x.shape)


def add_rms_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    inner: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds x, or its inner norm, to the residual in place and normalizes the sum."""
    if residual.shape != x.shape:
        raise EngineFault(f"x is {list(x.shape)}, and the residual is {list(residual.shape)}.")
    return _norm(x, residual, inner, weight, eps, offset)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    inner: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
) -> torch.Tensor:
    rows, d = x.shape
    for tensor in (x, x if residual is None else residual, weight, weight if inner is None else inner):
        _check(tensor, x.dtype, d)
    y = torch.empty(rows, d, dtype=x.dtype, device=x.device)
    launch = norm_launch(d)
    norm_row[rows,](
        x, residual, inner, weight, y, d, x.stride(0), 0 if residual is None else residual.stride(0), eps, offset,
        **launch.constants, **launch.options,
    )  # fmt: skip
    return y


def gated_activation(gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """`activation(gate) * up` for gate_up [rows, 2 d]."""
    rows, columns = gate_up.shape
    _check(gate_up, gate_up.dtype, columns)
    y = torch.empty(rows, columns // 2, dtype=gate_up.dtype, device=gate_up.device)
    launch = gate_launch(activation)
    gate_row[rows, triton.cdiv(columns // 2, COLUMNS)](
        gate_up, y, columns // 2, gate_up.stride(0), **launch.constants, **launch.options
    )
    return y


def rope_write(
    qkv: torch.Tensor,
    heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKV,
    pages: Pages,
    norms: HeadNorms | None = None,
) -> None:
    """Normalizes and rotates queries in place, and keys to their pages; copies values to their pages."""
    rows = len(qkv)
    pages.check(rows, len(kv.keys), kv.block_size)
    _check(qkv, kv.keys.dtype, (heads + 2 * kv.kv_heads) * kv.head_dim)
    for angles in (cos, sin):
        if angles.shape != (rows, kv.head_dim // 2) or not angles.is_contiguous():
            raise EngineFault(f"Angles {list(angles.shape)} don't fit {rows} rows of heads of {kv.head_dim}.")
    q_norm, k_norm, eps, offset = (
        (None, None, 0.0, 0.0) if norms is None else (norms.q, norms.k, norms.eps, norms.offset)
    )
    for norm in (q_norm, k_norm):
        if norm is not None:
            _check(norm, qkv.dtype, kv.head_dim)
    launch = rotate_launch(heads, kv.kv_heads, kv.head_dim)
    rotate_heads[rows, triton.cdiv(heads + 2 * kv.kv_heads, launch.constants["TILE"])](
        qkv, kv.keys, kv.values, cos, sin, pages.on(qkv.device).slots, q_norm, k_norm, qkv.stride(0), eps, offset,
        **launch.constants, **launch.options,
    )  # fmt: skip


@cache
def norm_launch(d: int) -> Launch:
    """The launch of `norm_row`: 16 elements per thread, so that a row stays in registers."""
    block = triton.next_power_of_2(d)
    return Launch("norm_row", {"BLOCK": block}, {"num_warps": min(32, max(1, block // 512))})


@cache
def gate_launch(activation: Activation) -> Launch:
    """The launch of `gate_row`."""
    return Launch("gate_row", {"GELU": activation == "gelu_tanh", "BLOCK": COLUMNS}, {"num_warps": 4})


@cache
def rotate_launch(heads: int, kv_heads: int, head_dim: int) -> Launch:
    """The launch of `rotate_heads`."""
    half = triton.next_power_of_2(head_dim // 2)
    tile = max(1, HEAD_ELEMENTS // (2 * half))
    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "HALF": half, "TILE": tile}
    return Launch("rotate_heads", constants, {"num_warps": 2})


def _check(tensor: torch.Tensor, dtype: torch.dtype, columns: int) -> None:
    if tensor.dtype != dtype or tensor.shape[-1] != columns or (columns > 1 and tensor.stride(-1) != 1):
        raise EngineFault(
            f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} must be {dtype} with {columns} "
            "contiguous columns."
        )
