"""Device code of the decoder's operations other than linears and attention: norms, rotation with paging, gates.

Each sum is over one row or head, in float32 and in one order, so a row's bits do not depend on the other rows. Results
are rounded where `loramill.kernels.torch_backend` rounds them; they differ from its results by the order of a sum and
by products that the GPU adds without rounding them first.
"""

# Compile-time arguments are in capitals, and types are Triton's own.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

#: sqrt(8 / pi): twice the factor of Hendrycks and Gimpel 2016, section 2, since tanh(u) is 2 sigmoid(2 u) - 1.
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def norm_row(
    x, residual, inner, weight, y, d, x_row, residual_row, eps, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `rms_norm`, or of `add_rms_norm` if there is a residual.

    Args:
        x: [rows, d]; a row's elements are adjacent, and rows are `x_row` apart.
        residual: [rows, d] with rows `residual_row` apart, changed in place; None: x is normalized alone.
        inner: [d]: the weight of the norm of x before it is added; None: x is added as it is.
        weight: [d].
        y: [rows, d], contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < d
    part = tl.load(x + row * x_row + n, mask=inside, other=0.0).to(tl.float32)
    if inner is not None:
        scale = tl.load(inner + n, mask=inside, other=0.0).to(tl.float32) + offset
        normed = part * _inverse_root(tl.sum(part * part, axis=0), d, eps) * scale
        part = normed.to(x.dtype.element_ty).to(tl.float32)
    if residual is not None:
        target = residual + row * residual_row + n
        added = (tl.load(target, mask=inside, other=0.0).to(tl.float32) + part).to(residual.dtype.element_ty)
        tl.store(target, added, mask=inside)
        part = added.to(tl.float32)
    scale = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32) + offset
    normed = part * _inverse_root(tl.sum(part * part, axis=0), d, eps) * scale
    tl.store(y + row * d + n, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_row(gate_up, y, d, gate_up_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a row of `gated_activation`, with SiLU, or GELU by tanh: both are g * sigmoid(...).

    Args:
        gate_up: [rows, 2 d]; a row's elements are adjacent, and rows are `gate_up_row` apart.
        y: [rows, d], contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < d
    gate = tl.load(gate_up + row * gate_up_row + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + d + n, mask=inside, other=0.0).to(tl.float32)
    angle = _SQRT_8_OVER_PI * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    active = (gate / (1 + tl.exp(-angle))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * d + n, (active * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(
    qkv, keys, values, cos, sin, slots, q_norm, k_norm, qkv_row, eps, offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE heads of a row of `rope_write`, with or without the norms of query and key heads.

    Args:
        qkv: [rows, (HEADS + 2 KV_HEADS) * HEAD_DIM]: query heads, key heads, value heads; a row's elements are
            adjacent, and rows are `qkv_row` apart. Queries are changed in place.
        keys, values: [positions, KV_HEADS, HEAD_DIM].
        cos, sin: float32 [rows, HEAD_DIM / 2].
        slots: int64 [rows]: the row's position in keys and values.
        q_norm, k_norm: [HEAD_DIM], or both None.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, HALF)
    known = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < HEAD_DIM // 2)[None, :]
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    place = head[:, None] * HEAD_DIM + d[None, :]
    query = qkv + row * qkv_row + place
    first = tl.load(query, mask=known, other=0.0).to(tl.float32)
    second = tl.load(query + HEAD_DIM // 2, mask=known, other=0.0).to(tl.float32)
    turned_first, turned_second = first, second
    if q_norm is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        shrunk = _inverse_root(squares, HEAD_DIM, eps)[:, None]
        first_scale = _head_scale(q_norm, k_norm, d, is_query, offset, HEAD_DIM)
        second_scale = _head_scale(q_norm + HEAD_DIM // 2, k_norm + HEAD_DIM // 2, d, is_query, offset, HEAD_DIM)
        turned_first = (first * shrunk * first_scale).to(qkv.dtype.element_ty).to(tl.float32)
        turned_second = (second * shrunk * second_scale).to(qkv.dtype.element_ty).to(tl.float32)
    angle = row * (HEAD_DIM // 2) + d
    c = tl.load(cos + angle, mask=d < HEAD_DIM // 2, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=d < HEAD_DIM // 2, other=0.0)[None, :]
    out_first = tl.where(is_value[:, None], first, turned_first * c - turned_second * s).to(qkv.dtype.element_ty)
    out_second = tl.where(is_value[:, None], second, turned_second * c + turned_first * s).to(qkv.dtype.element_ty)
    tl.store(query, out_first, mask=known & is_query[:, None])
    tl.store(query + HEAD_DIM // 2, out_second, mask=known & is_query[:, None])
    target = tl.load(slots + row) * (KV_HEADS * HEAD_DIM)
    key = keys + target + place - HEADS * HEAD_DIM
    is_key = known & (~is_query & ~is_value)[:, None]
    tl.store(key, out_first, mask=is_key)
    tl.store(key + HEAD_DIM // 2, out_second, mask=is_key)
    value = values + target + place - (HEADS + KV_HEADS) * HEAD_DIM
    tl.store(value, out_first, mask=known & is_value[:, None])
    tl.store(value + HEAD_DIM // 2, out_second, mask=known & is_value[:, None])


@triton.jit
def _inverse_root(squares, count, eps):
    return tl.rsqrt(squares / count + eps)


@triton.jit
def _head_scale(q_norm, k_norm, d, is_query, offset, HEAD_DIM: tl.constexpr):
    """Half of the weights of query and key heads, [heads, HALF]."""
    of_q = tl.load(q_norm + d, mask=d < HEAD_DIM // 2, other=0.0).to(tl.float32)
    of_k = tl.load(k_norm + d, mask=d < HEAD_DIM // 2, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_q[None, :], of_k[None, :]) + offset
