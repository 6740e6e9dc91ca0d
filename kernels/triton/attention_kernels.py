"""Device code of decode attention: one split of a sequence (`attend`), and the sum of its splits (`combine`).

The grid is (sequences, KV heads, splits or query heads of a KV head). No two programs write to the same place, and each
sum has one order, so the same call gives the same bits. Only a sequence's own positions are loaded: masked values are
zeros, never another sequence's NaN.
"""

# Compile-time arguments are in capitals, and types are Triton's own.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import triton
import triton.language as tl

#: About the lowest float32, not -inf: a split whose scores are all -inf then has weights of zero instead of NaN.
_LEAST = tl.constexpr(-3.4e38)
_LOG2 = tl.constexpr(math.log(2))


# The blocks follow a table of any length, so their alignment varies.
@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["blocks"])
def attend(
    qkv, keys, values, totals, peaks, table, blocks, scale, window, q_row,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One split of one sequence, for the query heads of one KV head.

    Args:
        qkv: [rows, ...]: queries first; a row's elements are adjacent, and rows are `q_row` apart.
        keys, values: [blocks, BLOCK_SIZE, KV heads, HEAD_DIM].
        totals: float32 [sequences, KV heads, GROUP, splits, DIM]: the values, weighted by exp2(score - peak).
        peaks: float32 [sequences, KV heads, GROUP, splits, 2]: the peak, and the sum of the weights.
        table, blocks: See `DecodeBatch`.
        scale: Factor of the scores, divided by log 2.
        window: Number of positions that a row sees.
        CAP: Scores, undivided, become CAP * tanh(score / CAP); 0: they are not capped.
    """
    entry = table + tl.program_id(0) * 3
    length = tl.load(entry + 1)
    begin, tiles, share = _shares(length, window, tl.num_programs(2), KEYS)
    tile = begin + tl.program_id(2) * share
    stop = tl.minimum(tile + share, tiles)
    if tile >= stop:
        return
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    own = blocks + tl.load(entry + 2)
    member = tl.arange(0, GROUPS)
    d = tl.arange(0, DIM)
    known = (member < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    query = qkv + tl.load(entry).to(tl.int64) * q_row + head * (GROUP * HEAD_DIM)
    q = tl.load(query + member[:, None] * HEAD_DIM + d[None, :], mask=known, other=0.0)
    peak = tl.full((GROUPS,), _LEAST, tl.float32)
    weights = tl.zeros((GROUPS,), tl.float32)
    total = tl.zeros((GROUPS, DIM), tl.float32)
    position = tile * KEYS + tl.arange(0, KEYS)
    # Nothing else is read: other sequences' values may be NaN.
    seen = (position < length) & (position >= length - window)
    block = tl.load(own + position // BLOCK_SIZE, mask=seen, other=0)
    for _ in range(tile, stop):
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        place = (slot * heads + head) * HEAD_DIM
        # The next tile's blocks are on their way while this tile is read: its keys' addresses depend on them.
        ahead = position + KEYS
        following = tl.load(own + ahead // BLOCK_SIZE, mask=(ahead < length) & (ahead >= length - window), other=0)
        k = tl.load(keys + place[None, :] + d[:, None], mask=seen[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        if CAP > 0:
            score = _capped(score, CAP)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        shrunk = tl.exp2(peak - higher)
        weight = tl.exp2(score - higher[:, None])
        weights = weights * shrunk + tl.sum(weight, axis=1)
        v = tl.load(values + place[:, None] + d[None, :], mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        total = tl.dot(weight.to(v.dtype), v, total * shrunk[:, None], input_precision="ieee")
        peak = higher
        position += KEYS
        seen = (position < length) & (position >= length - window)
        block = following
    part = ((tl.program_id(0) * heads + head).to(tl.int64) * GROUP + member) * tl.num_programs(2) + tl.program_id(2)
    tl.store(totals + part[:, None] * DIM + d[None, :], total, mask=known)
    tl.store(peaks + part * 2, peak, mask=member < GROUP)
    tl.store(peaks + part * 2 + 1, weights, mask=member < GROUP)


@triton.jit(do_not_specialize=["window"])
def combine(
    out, totals, peaks, table, window, out_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of one sequence and query head; for the arguments see `attend`."""
    entry = table + tl.program_id(0) * 3
    length = tl.load(entry + 1)
    if length == 0:
        return
    begin, tiles, share = _shares(length, window, SPLITS, KEYS)
    split = tl.arange(0, SPLITS)
    # The other splits have written nothing.
    live = split < tl.cdiv(tiles - begin, share)
    head = tl.program_id(1) * GROUP + tl.program_id(2)
    part = (tl.program_id(0) * tl.num_programs(1) * GROUP + head).to(tl.int64) * SPLITS + split
    peak = tl.load(peaks + part * 2, mask=live, other=_LEAST)
    scale = tl.exp2(peak - tl.max(peak, axis=0))
    weights = tl.sum(tl.load(peaks + part * 2 + 1, mask=live, other=0.0) * scale, axis=0)
    d = tl.arange(0, DIM)
    known = live[:, None] & (d < HEAD_DIM)[None, :]
    total = tl.load(totals + part[:, None] * DIM + d[None, :], mask=known, other=0.0)
    result = tl.sum(total * scale[:, None], axis=0) / weights
    target = out + tl.load(entry).to(tl.int64) * out_row + head * HEAD_DIM
    tl.store(target + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def _capped(score, CAP: tl.constexpr):
    """CAP * tanh(score / CAP) of scores that are divided by log 2: tanh x = 1 - 2 / (exp(2 x) + 1)."""
    # exp(2 x) = exp2(2 x / log 2), and x = score log 2 / CAP.
    return (CAP / _LOG2) * (1.0 - 2.0 / (tl.exp2(score * (2.0 / CAP)) + 1.0))


@triton.jit
def _shares(length, window, splits, KEYS: tl.constexpr):
    """The first of a sequence's tiles that a row sees, the one after the last, and the number of tiles per split."""
    begin = tl.maximum(length - window, 0) // KEYS
    tiles = tl.cdiv(length, KEYS)
    return begin, tiles, tl.cdiv(tiles - begin, splits)
