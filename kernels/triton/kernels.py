"""Device code: shrink (h = x A^T) and expand (y = gain * (y + h B^T)), for tiles of one row and of many; embeddings.

Common arguments of the kernels:
    x, y: [rows, ...] of the slab's dtype, or of any if that is int8; a row's elements are adjacent, and rows are
        `x_row` and `y_row` apart.
    weights, gains: The slab's arena as elements of its dtype, and as float32, which int8's scales are, too.
    table: int64 [slots, STRIDE, 4]: for each of a site's MODULES, the offsets in elements of a [rank, d_in], the
        transposed b [rank, width] and the gain [width] (-1: none), and the rank (0: not a target).
    starts: int32 [MODULES + 1]: the first column of y of each module, and the end.
    tiles: int32 [tiles, 4]: slot (-1: nothing to do), first row, row after the last, first rank.
    h: float32 [splits, MODULES, rows, h_row]: each split's part of the sums over d_in.
    ALIGN, ALIGN_Y: Divisors of the offsets into the weights, and of the first columns of y.

The grid is (tiles, modules, splits or blocks of columns). No two programs write to the same place, and each sum has one
order, so the same call gives the same bits. Nothing outside of a run's rows or an adapter's rank is loaded: masked
values are zeros, never another adapter's NaN.
"""

# Compile-time arguments are in capitals, and types are Triton's own.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

#: Integers that vary between steps: Triton would compile again for a 1 or a multiple of 16.
_VARYING = ["rows", "splits"]


@triton.jit(do_not_specialize=_VARYING)
def shrink_row(
    x, weights, gains, table, tiles, h, d_in, rows, x_row, h_row,
    MODULES: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Tiles of one row, without the matrix units: a is read once, in adjacent columns, for existing ranks only."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    entry = table + (slot * STRIDE + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    rank_first = tl.load(tile + 3)
    if rank_first >= rank:
        return
    row = tl.load(tile + 1).to(tl.int64)
    split = tl.program_id(2)
    r = rank_first + tl.arange(0, RANKS)
    offset = tl.multiple_of(tl.load(entry), ALIGN)
    total = _times_row(weights + offset, x + row * x_row, r, rank, d_in, split * STEPS, DEPTH, STEPS)
    if weights.dtype.element_ty == tl.int8:
        total *= _scales(gains, offset, r, rank)
    part = h + ((split * MODULES + module) * rows + row) * h_row
    tl.store(part + r, total, mask=r < rank)


@triton.jit(do_not_specialize=_VARYING)
def shrink_rows(
    x, weights, gains, table, tiles, h, d_in, rows, x_row, h_row,
    MODULES: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles of up to ROWS rows, on the matrix units."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    entry = table + (slot * STRIDE + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    rank_first = tl.load(tile + 3)
    if rank_first >= rank:
        return
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    mine = row < tl.load(tile + 2)
    r = rank_first + tl.arange(0, RANKS)
    live = r < rank
    x_rows = x + row.to(tl.int64)[:, None] * x_row
    offset = tl.multiple_of(tl.load(entry), ALIGN)
    a_ranks = weights + offset + r[None, :] * d_in
    split = tl.program_id(2)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
        inside = k < d_in
        x_part = tl.load(x_rows + k[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        a_part = tl.load(a_ranks + k[:, None], mask=inside[:, None] & live[None, :], other=0.0)
        total = tl.dot(x_part, a_part.to(x_part.dtype), total, input_precision="ieee")
    if weights.dtype.element_ty == tl.int8:
        total *= _scales(gains, offset, r, rank)[None, :]
    part = h + ((split * MODULES + module) * rows + row.to(tl.int64)) * h_row
    tl.store(part[:, None] + r[None, :], total, mask=mine[:, None] & live[None, :])


@triton.jit(do_not_specialize=_VARYING)
def expand_row(
    y, weights, gains, table, starts, tiles, h, splits, rows, y_row, h_row,
    MODULES: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    SPLITS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tiles of one row: b is read once, in adjacent columns, for existing ranks only."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    start = tl.multiple_of(tl.load(starts + module), ALIGN_Y)
    width = tl.multiple_of(tl.load(starts + module + 1) - start, ALIGN_Y)
    if tl.program_id(2) * WIDTH >= width:
        return
    entry = table + (slot * STRIDE + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank == 0:
        return
    row = tl.load(tile + 1).to(tl.int64)
    n = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    b = weights + tl.multiple_of(tl.load(entry + 1), ALIGN)
    split = tl.arange(0, SPLITS)
    part = h + ((split * MODULES + module) * rows + row) * h_row
    total = tl.zeros((WIDTH,), tl.float32)
    rank_first = 0
    while rank_first < rank:
        r = rank_first + tl.arange(0, RANKS)
        live = r < rank
        b_part = tl.load(b + r[:, None] * width + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        parts = tl.load(part[:, None] + r[None, :], mask=(split < splits)[:, None] & live[None, :], other=0.0)
        total += tl.sum(tl.sum(parts, axis=0)[:, None] * b_part.to(tl.float32), axis=0)
        rank_first += RANKS
    _add_to_row(y + row * y_row + start, n, inside, total, gains, tl.load(entry + 2))


@triton.jit(do_not_specialize=_VARYING)
def expand_rows(
    y, weights, gains, table, starts, tiles, h, splits, rows, y_row, h_row,
    MODULES: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    SPLITS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles of up to ROWS rows, on the matrix units; h is rounded to y's dtype, as a linear's output is."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    start = tl.multiple_of(tl.load(starts + module), ALIGN_Y)
    width = tl.multiple_of(tl.load(starts + module + 1) - start, ALIGN_Y)
    if tl.program_id(2) * WIDTH >= width:
        return
    entry = table + (slot * STRIDE + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank == 0:
        return
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    mine = row < tl.load(tile + 2)
    n = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    b = weights + tl.multiple_of(tl.load(entry + 1), ALIGN)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    rank_first = 0
    while rank_first < rank:
        r = rank_first + tl.arange(0, RANKS)
        live = r < rank
        b_part = tl.load(b + r[:, None] * width + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        h_part = tl.zeros((ROWS, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            part = h + ((split * MODULES + module) * rows + row.to(tl.int64)) * h_row
            known = mine[:, None] & live[None, :] & (split < splits)
            h_part += tl.load(part[:, None] + r[None, :], mask=known, other=0.0)
        dtype = y.dtype.element_ty
        total = tl.dot(h_part.to(dtype), b_part.to(dtype), total, input_precision="ieee")
        rank_first += RANKS
    gain = tl.load(entry + 2)
    scale = tl.load(gains + gain + n, mask=inside & (gain >= 0), other=1.0)
    target = y + row.to(tl.int64)[:, None] * y_row + start + n[None, :]
    known = mine[:, None] & inside[None, :]
    result = scale[None, :] * (tl.load(target, mask=known, other=0.0).to(tl.float32) + total)
    tl.store(target, result.to(y.dtype.element_ty), mask=known)


@triton.jit
def fused_row(
    x, y, weights, gains, table, starts, tiles, d_in, x_row, y_row,
    MODULES: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Shrink and expand of one row in one launch, for ranks up to RANKS; each block of columns repeats the shrink."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    start = tl.multiple_of(tl.load(starts + module), ALIGN_Y)
    width = tl.multiple_of(tl.load(starts + module + 1) - start, ALIGN_Y)
    if tl.program_id(2) * WIDTH >= width:
        return
    entry = table + (slot * STRIDE + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank == 0:
        return
    row = tl.load(tile + 1).to(tl.int64)
    r = tl.arange(0, RANKS)
    live = r < rank
    n = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    b = weights + tl.multiple_of(tl.load(entry + 1), ALIGN)
    b_part = tl.load(b + r[:, None] * width + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
    offset = tl.multiple_of(tl.load(entry), ALIGN)
    shrunk = _times_row(weights + offset, x + row * x_row, r, rank, d_in, 0, DEPTH, STEPS)
    if weights.dtype.element_ty == tl.int8:
        shrunk *= _scales(gains, offset, r, rank)
    # x may hold an Inf or NaN, which times the zeros of a rank that does not exist is NaN.
    shrunk = tl.where(live, shrunk, 0.0)
    total = tl.sum(shrunk[:, None] * b_part.to(tl.float32), axis=0)
    _add_to_row(y + row * y_row + start, n, inside, total, gains, tl.load(entry + 2))


@triton.jit
def embed_row(
    y, weights, gains, tokens, table, scale, width, y_row,
    ALIGN: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of a row of an embedding with an adapter, rank by rank as in `loramill.kernels.adapters.embedding`.

    Args:
        y: [rows, width], of any floating dtype.
        tokens: int64 [rows].
        table: int64 [programs, 4]: the row, the offsets in elements of a [vocabulary, rank] and b [rank, width], and
            the rank.
    """
    entry = table + tl.program_id(0) * 4
    row = tl.load(entry)
    offset = tl.load(entry + 1)
    rank = tl.load(entry + 3).to(tl.int32)
    a = weights + offset + tl.load(tokens + row) * rank
    b = weights + tl.multiple_of(tl.load(entry + 2), ALIGN)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    total = tl.zeros((WIDTH,), tl.float32)
    rank_first = 0
    while rank_first < rank:
        # Unrolled, so that all rows of b are on their way at once.
        for step in tl.static_range(RANKS):
            r = rank_first + step
            live = r < rank
            shrunk = tl.load(a + r, mask=live, other=0.0).to(tl.float32)
            if weights.dtype.element_ty == tl.int8:
                shrunk *= _scales(gains, offset, r, rank)
            total += shrunk * tl.load(b + r * width + n, mask=inside & live, other=0.0).to(tl.float32)
        rank_first += RANKS
    target = y + row * y_row + n
    result = tl.load(target, mask=inside, other=0.0).to(tl.float32) + total * scale
    tl.store(target, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _times_row(a, x, r, rank, d_in, first_step, DEPTH: tl.constexpr, STEPS: tl.constexpr):
    """Rows r of a [rank, d_in] times x [d_in], summed over STEPS iterations of DEPTH columns from `first_step` on."""
    total = tl.zeros((r.shape[0], DEPTH), tl.float32)
    for step in range(STEPS):
        k = (first_step + step) * DEPTH + tl.arange(0, DEPTH)
        inside = k < d_in
        x_part = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        known = (r < rank)[:, None] & inside[None, :]
        a_part = tl.load(a + r[:, None] * d_in + k[None, :], mask=known, other=0.0)
        total += a_part.to(tl.float32) * x_part[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _scales(gains, offset, r, rank):
    """The scales of ranks r of an int8 adapter; they fill whole cache lines of 16 numbers just before a's offset."""
    scales = gains + offset // 4 - tl.cdiv(rank, 16) * 16
    return tl.load(scales + r, mask=r < rank, other=0.0)


@triton.jit
def _add_to_row(y, n, inside, total, gains, gain):
    """Columns n of y become gain * (y + total); a missing gain is 1, which changes no bit."""
    scale = tl.load(gains + gain + n, mask=inside & (gain >= 0), other=1.0)
    result = scale * (tl.load(y + n, mask=inside, other=0.0).to(tl.float32) + total)
    tl.store(y + n, result.to(y.dtype.element_ty), mask=inside)
