"""Device code: a product with weights in int8, and the rounding of rows to float8."""

# Compile-time arguments are in capitals, and types are Triton's own.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from loramill.kernels.quantization import FP8_LARGEST, FP8_SMALLEST

_LARGEST, _SMALLEST = tl.constexpr(FP8_LARGEST), tl.constexpr(FP8_SMALLEST)


@triton.jit(do_not_specialize=["rows"])
def int8_linear(
    x, codes, scales, y, rows, d_in, d_out, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = x (codes * scales)^T for x [rows, d_in], int8 codes [d_out, d_in] and float32 scales [d_out].

    The codes are the left operand, whose conversion to x's dtype stays in registers; it is exact.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_rows = x + m.to(tl.int64)[None, :] * x_row
    code_rows = codes + n.to(tl.int64)[:, None] * d_in
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, d_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < d_in
        code = tl.load(code_rows + k[None, :], mask=(n < d_out)[:, None] & inside[None, :], other=0)
        part = tl.load(x_rows + k[:, None], mask=(m < rows)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(code.to(part.dtype), part, total, input_precision="ieee")
    total *= tl.load(scales + n, mask=n < d_out, other=0.0)[:, None]
    to = y + m.to(tl.int64)[None, :] * d_out + n[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < d_out)[:, None])


@triton.jit
def quantize_rows(x, codes, scales, d_in, x_row, DEPTH: tl.constexpr):
    """Rounds each row of x [rows, d_in] to float8_e4m3fn with a float32 scale, as `quantize` rounds a weight's rows.

    A row is read twice, the second time from a cache. A NaN stays one, and an infinity makes its row NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, d_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * x_row + k, mask=k < d_in, other=0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(largest, axis=0), _SMALLEST) / _LARGEST
    tl.store(scales + row, scale)
    for start in range(0, d_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        value = tl.load(x + row * x_row + k, mask=k < d_in, other=0.0).to(tl.float32) / scale
        value = tl.clamp(value, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(codes + row * d_in + k, value.to(tl.float8e4nv), mask=k < d_in)
