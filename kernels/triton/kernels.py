"""The device code: shrink (h = x A^T) and expand (y = gain * (y + h B^T)), for one row a tile and for many.

Arguments that the kernels share:
    x, y: [rows, ...] in the slab's dtype; a row's elements are adjacent, `x_row` and `y_row` apart from the next row's.
    weights, gains: the slab's arena as elements of its dtype, and as float32.
    table: int64 [slots, modules, 4]: elements from the start to a [rank, d_in], to the transposed b [rank, width] and to
        the gain [width] (-1: none), and the rank (0: no target).
    columns: int32 [modules + 1]: where in y each module begins, and the end.
    tiles: int32 [tiles, 4]: slot (-1: nothing to do), first row, row after the last, first rank.
    h: float32 [splits, modules, rows, h_row]: the parts of each sum over d_in that a split added up.

The grid is (tiles, modules, splits or blocks of columns). Each program writes what no other writes, and each sum has one
order, so the same call gives the same bits. Nothing outside a run's rows or an adapter's rank is loaded: masked values
are zeros, never another's NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shrink_row(
    x, weights, table, tiles, h, d_in, rows, x_row, h_row,
    MODULES: tl.constexpr, ALIGN: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Tiles of one row, without the matrix units: a is read once, 16 bytes a thread, all of it in flight at once."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    row = tl.load(tile + 1).to(tl.int64)
    rank_first = tl.load(tile + 3)
    module = tl.program_id(1)
    entry = table + (slot * MODULES + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank_first >= rank:
        return
    a = weights + tl.multiple_of(tl.load(entry), ALIGN)
    r = rank_first + tl.arange(0, RANKS)
    live = r < rank
    split = tl.program_id(2)
    total = tl.zeros((RANKS, DEPTH), tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
        inside = k < d_in
        x_part = tl.load(x + row * x_row + k, mask=inside, other=0.0).to(tl.float32)
        a_part = tl.load(a + r[:, None] * d_in + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        total += a_part.to(tl.float32) * x_part[None, :]
    part = h + ((split * MODULES + module) * rows + row) * h_row
    tl.store(part + r, tl.sum(total, axis=1), mask=live)


@triton.jit
def shrink_rows(
    x, weights, table, tiles, h, d_in, rows, x_row, h_row,
    MODULES: tl.constexpr, ALIGN: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles of up to ROWS rows, on the matrix units."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    end = tl.load(tile + 2)
    rank_first = tl.load(tile + 3)
    module = tl.program_id(1)
    entry = table + (slot * MODULES + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank_first >= rank:
        return
    a = weights + tl.multiple_of(tl.load(entry), ALIGN)
    r = rank_first + tl.arange(0, RANKS)
    live = r < rank
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    mine = row < end
    x_rows = x + row.to(tl.int64)[:, None] * x_row
    a_ranks = a + r[None, :] * d_in
    split = tl.program_id(2)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
        inside = k < d_in
        x_part = tl.load(x_rows + k[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        a_part = tl.load(a_ranks + k[:, None], mask=inside[:, None] & live[None, :], other=0.0)
        total = tl.dot(x_part, a_part, total, input_precision="ieee")
    part = h + ((split * MODULES + module) * rows + row.to(tl.int64)) * h_row
    tl.store(part[:, None] + r[None, :], total, mask=mine[:, None] & live[None, :])


@triton.jit
def expand_row(
    y, weights, gains, table, columns, tiles, h, splits, rows, y_row, h_row,
    MODULES: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    SPLITS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tiles of one row: the transposed b is read once, in adjacent columns, for the adapter's own ranks alone."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    column = tl.multiple_of(tl.load(columns + module), ALIGN_Y)
    width = tl.multiple_of(tl.load(columns + module + 1) - column, ALIGN_Y)
    if tl.program_id(2) * WIDTH >= width:
        return
    row = tl.load(tile + 1).to(tl.int64)
    entry = table + (slot * MODULES + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank == 0:
        return
    b = weights + tl.multiple_of(tl.load(entry + 1), ALIGN)
    gain = tl.load(entry + 2)
    n = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    split = tl.arange(0, SPLITS)
    part = h + (split[:, None] * MODULES + module) * rows * h_row + row * h_row
    total = tl.zeros((WIDTH,), tl.float32)
    rank_first = 0
    while rank_first < rank:
        r = rank_first + tl.arange(0, RANKS)
        live = r < rank
        b_part = tl.load(b + r[:, None] * width + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        parts = tl.load(part + r[None, :], mask=(split < splits)[:, None] & live[None, :], other=0.0)
        total += tl.sum(tl.sum(parts, axis=0)[:, None] * b_part.to(tl.float32), axis=0)
        rank_first += RANKS
    scale = tl.load(gains + gain + n, mask=inside & (gain >= 0), other=1.0)
    target = y + row * y_row + column + n
    result = scale * (tl.load(target, mask=inside, other=0.0).to(tl.float32) + total)
    tl.store(target, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def expand_rows(
    y, weights, gains, table, columns, tiles, h, splits, rows, y_row, h_row,
    MODULES: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    RANKS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles of up to ROWS rows, on the matrix units; h is rounded to the weights' dtype, as a linear's output is."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    column = tl.multiple_of(tl.load(columns + module), ALIGN_Y)
    width = tl.multiple_of(tl.load(columns + module + 1) - column, ALIGN_Y)
    if tl.program_id(2) * WIDTH >= width:
        return
    end = tl.load(tile + 2)
    entry = table + (slot * MODULES + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank == 0:
        return
    b = weights + tl.multiple_of(tl.load(entry + 1), ALIGN)
    gain = tl.load(entry + 2)
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    mine = row < end
    n = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    rank_first = 0
    while rank_first < rank:
        r = rank_first + tl.arange(0, RANKS)
        live = r < rank
        b_part = tl.load(b + r[:, None] * width + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        h_part = tl.zeros((ROWS, RANKS), tl.float32)
        split = 0
        while split < splits:
            part = h + ((split * MODULES + module) * rows + row.to(tl.int64)) * h_row
            h_part += tl.load(part[:, None] + r[None, :], mask=mine[:, None] & live[None, :], other=0.0)
            split += 1
        total = tl.dot(h_part.to(b_part.dtype), b_part, total, input_precision="ieee")
        rank_first += RANKS
    scale = tl.load(gains + gain + n, mask=inside & (gain >= 0), other=1.0)
    target = y + row.to(tl.int64)[:, None] * y_row + column + n[None, :]
    known = mine[:, None] & inside[None, :]
    result = scale[None, :] * (tl.load(target, mask=known, other=0.0).to(tl.float32) + total)
    tl.store(target, result.to(y.dtype.element_ty), mask=known)


@triton.jit
def fused_row(
    x, y, weights, gains, table, columns, tiles, d_in, x_row, y_row,
    MODULES: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Shrink and expand of one row in one launch, for ranks up to RANKS: each block of columns shrinks for itself."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if slot < 0:
        return
    module = tl.program_id(1)
    column = tl.multiple_of(tl.load(columns + module), ALIGN_Y)
    width = tl.multiple_of(tl.load(columns + module + 1) - column, ALIGN_Y)
    if tl.program_id(2) * WIDTH >= width:
        return
    row = tl.load(tile + 1).to(tl.int64)
    entry = table + (slot * MODULES + module) * 4
    rank = tl.load(entry + 3).to(tl.int32)
    if rank == 0:
        return
    a = weights + tl.multiple_of(tl.load(entry), ALIGN)
    b = weights + tl.multiple_of(tl.load(entry + 1), ALIGN)
    gain = tl.load(entry + 2)
    r = tl.arange(0, RANKS)
    live = r < rank
    n = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = n < width
    parts = tl.zeros((RANKS, DEPTH), tl.float32)
    for step in range(STEPS):
        k = step * DEPTH + tl.arange(0, DEPTH)
        x_part = tl.load(x + row * x_row + k, mask=k < d_in, other=0.0).to(tl.float32)
        a_part = tl.load(a + r[:, None] * d_in + k[None, :], mask=live[:, None] & (k < d_in)[None, :], other=0.0)
        parts += a_part.to(tl.float32) * x_part[None, :]
    # x may hold an Inf or NaN, which times the zeros of a dead rank is NaN.
    shrunk = tl.where(live, tl.sum(parts, axis=1), 0.0)
    b_part = tl.load(b + r[:, None] * width + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
    total = tl.sum(shrunk[:, None] * b_part.to(tl.float32), axis=0)
    scale = tl.load(gains + gain + n, mask=inside & (gain >= 0), other=1.0)
    target = y + row * y_row + column + n
    result = scale * (tl.load(target, mask=inside, other=0.0).to(tl.float32) + total)
    tl.store(target, result.to(y.dtype.element_ty), mask=inside)
