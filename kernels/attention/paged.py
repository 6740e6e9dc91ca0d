"""Paged attention in plain torch: keys and values are gathered from their blocks for kernels of torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from loramill.kernels.attention import capped, varlen
from loramill.kernels.backend import LayerKV
from loramill.kernels.memory import to_device
from loramill.kernels.paging import BLOCKS, COUNT, FIRST, START, KVSpan, Pages

#: Bytes of keys and values that prefills copy at once on a GPU, if no single sequence has more.
GATHERED = 256 << 20


def attention(
    qkv: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of each row to its sequence's positions; returns [rows, heads * head_dim]."""
    pages.check(len(qkv), len(kv.keys), kv.block_size)
    out = torch.empty(len(qkv), heads * kv.head_dim, dtype=qkv.dtype, device=qkv.device)
    _attend_decodes(qkv, out, heads, kv, pages, scale, window, cap)
    attend_prefills(qkv, out, heads, kv, pages, scale, window, cap)
    return out


def attend_prefills(
    qkv: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> None:
    """`attention` for sequences with several rows, written to their rows of out [rows, heads * head_dim]."""
    if cap is None and qkv.device.type == "cuda" and varlen.is_supported(qkv.dtype, kv.head_dim):
        attend_prefills_together(qkv, out, heads, kv, pages, scale, window)
        return
    prefills = _prefills(pages, window, qkv.device)
    q, results = (part[:, : heads * kv.head_dim].view(len(qkv), heads, kv.head_dim) for part in (qkv, out))
    for prefill in prefills:
        keys, values = (_gather(part, prefill.blocks, 1)[:, : prefill.length] for part in (kv.keys, kv.values))
        if cap is not None:
            results[prefill.rows] = capped.attend_last(q[prefill.rows], keys[0], values[0], scale, cap, window)
            continue
        done = F.scaled_dot_product_attention(
            q[prefill.rows].transpose(0, 1)[None], keys.transpose(1, 2), values.transpose(1, 2),
            attn_mask=prefill.mask, is_causal=prefill.mask is None, scale=scale, enable_gqa=True,
        )  # fmt: skip
        results[prefill.rows] = done[0].transpose(0, 1)


def attend_prefills_together(
    qkv: torch.Tensor, out: torch.Tensor, heads: int, kv: LayerKV, pages: Pages, scale: float, window: int | None
) -> None:
    """`attend_prefills` in one launch for all sequences, or few for very long ones, without a mask: see `varlen`."""
    q, results = (part[:, : heads * kv.head_dim].view(len(qkv), heads, kv.head_dim) for part in (qkv, out))
    width = kv.kv_heads * kv.head_dim
    for prefills in _prefills_together(pages, window, GATHERED // (2 * width * qkv.itemsize), qkv.device):
        # Only the sequences' own positions are copied: another sequence's NaN is not read.
        keys, values = (
            F.embedding(prefills.slots, part.view(-1, width)).view(-1, kv.kv_heads, kv.head_dim)
            for part in (kv.keys, kv.values)
        )
        done, _ = varlen.forward(q[prefills.rows], keys, values, prefills.batch, scale=scale, window=window)
        results[prefills.rows] = done


def _attend_decodes(
    qkv: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None,
    cap: float | None,
) -> None:
    """`attention` for sequences with one row, written to their rows of out."""
    # The query heads of one KV head take the axis of query positions, so that nothing is repeated.
    shape = (len(qkv), kv.kv_heads, heads // kv.kv_heads, kv.head_dim)
    q, results = qkv[:, : heads * kv.head_dim].view(shape), out.view(shape)
    for decode in _decodes(pages, window, qkv.device):
        keys, values = (_gather(part, decode.blocks, len(decode.rows)) for part in (kv.keys, kv.values))
        for gathered in (keys, values):
            # A masked position is still multiplied by zero, which another sequence's NaN would survive.
            gathered.flatten(0, 1).index_fill_(0, decode.stale, 0)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if cap is None:
            done = F.scaled_dot_product_attention(q[decode.rows], keys, values, attn_mask=decode.mask, scale=scale)
        else:
            done = capped.attend(q[decode.rows], keys, values, decode.mask, scale, cap)
        results[decode.rows] = done


@dataclass(frozen=True, slots=True)
class _Decode:
    """Sequences with one new row and of similar length.

    Attributes:
        rows: int64 [n]: their rows.
        blocks: int64 [n * width]: the blocks of each sequence, padded with block 0.
        stale: int64 [...]: those of the n * width * block_size positions that are not the sequence's own.
        mask: bool [n, 1, 1, width * block_size]: the positions that the row sees.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    stale: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A sequence with several new rows.

    Attributes:
        rows: Its rows of the step.
        blocks: int64 [...]: the blocks that any of the rows sees.
        length: Number of positions in these blocks that are the sequence's own.
        mask: bool [count, length]; None if a causal mask suffices.
    """

    rows: slice
    blocks: torch.Tensor
    length: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _PrefillsTogether:
    """Sequences with several new rows, for one launch.

    Attributes:
        rows: Their rows of the step: a slice if they are adjacent, else int32 [...].
        slots: int32 [keys]: where the keys and values that any of the rows sees are, sequence by sequence.
        batch: The boundaries of the sequences in both.
    """

    rows: slice | torch.Tensor
    slots: torch.Tensor
    batch: varlen.VarlenBatch


def _decodes(pages: Pages, window: int | None, device: torch.device) -> list[_Decode]:
    key = (_Decode, window, device)
    if key not in pages.memo:
        groups: dict[int, list[tuple[int, KVSpan]]] = {}
        for row, span in zip(pages.table[:, FIRST].tolist(), pages.spans, strict=True):
            if span.count == 1:
                # Lengths within a factor of two share a gather: the padding is less than the real work.
                used = len(_seen(span, window, pages.block_size)[1])
                groups.setdefault(used.bit_length(), []).append((row, span))
        pages.memo[key] = [_decode(group, window, pages.block_size, device) for group in groups.values()]
    decodes: list[_Decode] = pages.memo[key]
    return decodes


def _prefills(pages: Pages, window: int | None, device: torch.device) -> list[_Prefill]:
    key = (_Prefill, window, device)
    if key not in pages.memo:
        pages.memo[key] = [
            _prefill(row, span, window, pages.block_size, device)
            for row, span in zip(pages.table[:, FIRST].tolist(), pages.spans, strict=True)
            if span.count > 1
        ]
    prefills: list[_Prefill] = pages.memo[key]
    return prefills


def _prefills_together(pages: Pages, window: int | None, limit: int, device: torch.device) -> list[_PrefillsTogether]:
    """The sequences with several rows, in parts of about `limit` keys."""
    key = (_PrefillsTogether, window, limit, device)
    if key not in pages.memo:
        table = pages.table[pages.table[:, COUNT] > 1]
        stops = table[:, START] + table[:, COUNT]
        seen_from = np.zeros_like(stops) if window is None else np.maximum(0, table[:, START] + 1 - window)
        keys = stops - seen_from
        parts = (np.cumsum(keys, dtype=np.int64) - keys) // limit
        pages.memo[key] = [
            _together(pages, table[parts == part], seen_from[parts == part], keys[parts == part], device)
            for part in np.unique(parts)
        ]
    together: list[_PrefillsTogether] = pages.memo[key]
    return together


def _together(
    pages: Pages,
    table: NDArray[np.int32],
    seen_from: NDArray[np.int32],
    keys: NDArray[np.int32],
    device: torch.device,
) -> _PrefillsTogether:
    """The sequences of some lines of the pages' table, each of which sees `keys` positions from `seen_from` on."""
    positions = _ranges(seen_from, keys)
    blocks = pages.blocks[np.repeat(table[:, BLOCKS], keys) + positions // pages.block_size]
    slots = blocks * np.int32(pages.block_size) + positions % pages.block_size
    rows = _ranges(table[:, FIRST], table[:, COUNT])
    first, stop = int(rows[0]), int(rows[-1]) + 1
    adjacent = stop - first == len(rows)
    parts = [varlen.starts_of(table[:, COUNT]), varlen.starts_of(keys), slots, *([] if adjacent else [rows])]
    # One copy to the device for all of them.
    there = torch.split(to_device(np.concatenate(parts), device), [len(part) for part in parts])
    row_starts, key_starts, slots_there, *rows_there = there
    batch = varlen.VarlenBatch(row_starts, key_starts, int(table[:, COUNT].max()), int(keys.max()))
    return _PrefillsTogether(slice(first, stop) if adjacent else rows_there[0], slots_there, batch)


def _ranges(starts: NDArray[np.int32], sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    """The numbers from each start on, as many as its size: int32 [sum of the sizes]."""
    before = np.cumsum(sizes, dtype=np.int32) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum(), dtype=np.int32)


def _seen(span: KVSpan, window: int | None, block_size: int) -> tuple[int, list[int]]:
    """The blocks that any row of the span sees, preceded by the first position of the first of them."""
    first = 0 if window is None else max(0, span.start + 1 - window) // block_size
    return first * block_size, list(span.block_table[first : -(-span.stop // block_size)])


def _decode(members: list[tuple[int, KVSpan]], window: int | None, block_size: int, device: torch.device) -> _Decode:
    seen = [_seen(span, window, block_size) for _, span in members]
    width = max(len(blocks) for _, blocks in seen)
    tables = torch.tensor([blocks + [0] * (width - len(blocks)) for _, blocks in seen])
    positions = torch.tensor([start for start, _ in seen])[:, None] + torch.arange(width * block_size)
    stops = torch.tensor([span.stop for _, span in members])[:, None]
    own = positions < stops
    mask = own if window is None else own & (positions >= stops - window)
    stale = (~own).flatten().nonzero()[:, 0]
    rows = torch.tensor([row for row, _ in members])
    return _Decode(rows.to(device), tables.flatten().to(device), stale.to(device), mask[:, None, None].to(device))


def _prefill(row: int, span: KVSpan, window: int | None, block_size: int, device: torch.device) -> _Prefill:
    start, blocks = _seen(span, window, block_size)
    mask = None
    if span.start > 0 or window is not None:
        positions = torch.arange(start, span.stop, device=device)
        own = torch.arange(span.start, span.stop, device=device)[:, None]
        mask = positions <= own if window is None else (positions <= own) & (positions > own - window)
    rows = slice(row, row + span.count)
    return _Prefill(rows, torch.tensor(blocks, device=device), span.stop - start, mask)


def _gather(part: torch.Tensor, blocks: torch.Tensor, sequences: int) -> torch.Tensor:
    """Gathers blocks of a layer's keys or values as [sequences, positions, kv_heads, head_dim]."""
    # index_select over more than two dimensions copies element by element on a CPU.
    return F.embedding(blocks, part.flatten(1)).view(sequences, -1, *part.shape[2:])
