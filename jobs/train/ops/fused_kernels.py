"""Device code of the elementwise layers of a base in training, forward and backward: norm, gated product, rotation.

Each kernel does in one pass over memory what transformers does in 2 to 10, and rounds where transformers rounds: every
number that transformers writes to memory in the base's dtype is rounded to it here, too. Sums are float32 and have one
order, and no two programs write to the same place, so the same call gives the same bits. Weights are frozen: there are
no sums over rows.
"""

# Compile-time arguments are in capitals, and types are Triton's own.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, weight, y, rows, x_row, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """y = x / sqrt(mean(x^2) + eps) * weight, for ROWS rows.

    Args:
        x: [rows, WIDTH]; a row's elements are adjacent, and rows are `x_row` apart.
        weight: [WIDTH].
        y: [rows, WIDTH], contiguous.
        COLUMNS: The power of two that is not less than WIDTH.
        PLUS_ONE: Whether the factor is 1 + weight, in float32, as in Gemma.
    """
    row, column, inside = _tile(rows, WIDTH, COLUMNS, ROWS)
    own = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = own * _scale(own, eps, WIDTH)[:, None]
    result = normed * (1.0 + factor) if PLUS_ONE else _rounded(normed, y) * factor
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    x, weight, d_y, d_x, rows, x_row, d_y_row, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """The gradient of `norm_forward` in x; the scales are computed again, since x is read in any case."""
    row, column, inside = _tile(rows, WIDTH, COLUMNS, ROWS)
    own = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    back = tl.load(d_y + row * d_y_row + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    scale = _scale(own, eps, WIDTH)[:, None]
    normed = own * scale
    d_normed = back * (1.0 + factor) if PLUS_ONE else _rounded(back * factor, d_y)
    along = tl.sum(d_normed * normed, axis=1)[:, None] / WIDTH
    result = (d_normed - normed * along) * scale
    tl.store(d_x + row * WIDTH + column, result.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def gated_forward(gate, up, y, count, SIZE: tl.constexpr, GELU: tl.constexpr):
    """y = act(gate) * up for SIZE elements of contiguous tensors of `count`; see `_activation` for GELU."""
    place, inside = _elements(count, SIZE)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    share, _ = _activation(x, GELU)
    tl.store(y + place, (_rounded(x * share, y) * other).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(gate, up, d_y, d_gate, d_up, count, SIZE: tl.constexpr, GELU: tl.constexpr):
    """The gradients of `gated_forward`; the activation is computed again, since gate is read in any case."""
    place, inside = _elements(count, SIZE)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    back = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
    share, slope = _activation(x, GELU)
    d_activation = _rounded(back * other, d_y)
    d_x = d_activation * (share + x * share * (1.0 - share) * slope)
    tl.store(d_gate + place, d_x.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + place, (back * _rounded(x * share, d_y)).to(d_up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["angles"])
def rotate(
    q, k, cos, sin, q_out, k_out, angles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotates queries and keys: BLOCK heads of one token of either.

    Args:
        q, q_out: [tokens, HEADS, 2 HALF], contiguous.
        k, k_out: [tokens, KV_HEADS, 2 HALF], contiguous.
        cos, sin: [angles, 2 HALF], contiguous, in the dtype of q. The two halves of a row are equal. The angles of a
            token are those of its number modulo `angles`.
        COLUMNS: The power of two that is not less than HALF.
        INVERSE: Whether to rotate back, which is the gradient.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = tl.arange(0, COLUMNS)[None, :]
    angle = (token % angles) * (2 * HALF) + column
    c = tl.load(cos + angle, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=column < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    if block < blocks:
        _rotate_heads(q, q_out, c, s, token, block * BLOCK, column, HEADS, HALF, BLOCK)
    else:
        _rotate_heads(k, k_out, c, s, token, (block - blocks) * BLOCK, column, KV_HEADS, HALF, BLOCK)


@triton.jit
def _rotate_heads(
    x, y, c, s, token, first, column, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rotates BLOCK heads of a token from head `first` on."""
    head = first + tl.arange(0, BLOCK)[:, None]
    inside = (head < HEADS) & (column < HALF)
    place = (token * HEADS + head) * (2 * HALF) + column
    low = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (_rounded(low * c, y) - _rounded(high * s, y)).to(y.dtype.element_ty), mask=inside)
    tl.store(y + place + HALF, (_rounded(high * c, y) + _rounded(low * s, y)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _tile(rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows [ROWS, 1], its columns [1, COLUMNS], and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < WIDTH)


@triton.jit
def _elements(count, SIZE: tl.constexpr):
    """A program's elements, and which of them exist."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return place, place < count


@triton.jit
def _scale(own, eps, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row."""
    return tl.rsqrt(tl.sum(own * own, axis=1) / WIDTH + eps)


@triton.jit
def _activation(x, GELU: tl.constexpr):
    """s and t' of an activation x * s with s = sigmoid(t): SiLU, where t is x, or the tanh approximation of GELU.

    0.5 (1 + tanh(z)) = sigmoid(2 z), so that GELU's t is sqrt(8 / pi) (x + 0.044715 x^3). The derivative is
    s + x s (1 - s) t'.
    """
    if GELU:
        t = _SQRT_8_OVER_PI * (x + _CUBIC * x * x * x)
        slope = _SQRT_8_OVER_PI * (1.0 + 3.0 * _CUBIC * x * x)
    else:
        t = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return 1.0 / (1.0 + tl.exp(-t)), slope


@triton.jit
def _rounded(value, like):
    """A float32 value, rounded to the dtype that `like` points to."""
    return value.to(like.dtype.element_ty).to(tl.float32)
