"""The paged KV cache, and attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loramill.serve.model.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that pass the decoder in this step.

    Attributes:
        tokens: the new ones, at least one.
        start: position of the first of them; all before it are in the cache.
        blocks: the sequence's blocks in order, enough for `start + len(tokens)` positions.
        sampled: whether the logits after the last token are wanted.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sampled: bool

    @property
    def stop(self) -> int:
        """Positions that the sequence has after this step."""
        return self.start + len(self.tokens)


class KVCache:
    """Keys and values of all layers in blocks of `block_size` positions; callers number blocks from 0.

    A block given to a sequence must be cleared first: the padding of a gather reads whole blocks, and a masked
    position still multiplies its value by zero, which another tenant's NaN would survive.
    """

    def __init__(self, config: DecoderConfig, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.block_size = block_size
        # One block more, always zero, for padding. Memory is untouched, hence not yet there, until a block is used.
        shape = (config.layers, blocks + 1, block_size, config.kv_heads, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype)
        self._values = torch.empty(shape, dtype=dtype)
        self._padding = blocks
        self.clear([blocks])

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks that pass to a new owner."""
        if blocks:
            index = torch.tensor(blocks)
            self._keys[:, index] = 0
            self._values[:, index] = 0

    def plan(self, chunks: Sequence[Chunk]) -> AttentionPlan:
        """Works out, once a step, where rows are written and what each sequence reads."""
        writes: list[int] = []
        decodes: dict[int, list[tuple[int, Chunk]]] = {}
        prefills: list[Prefill] = []
        row = 0
        for chunk in chunks:
            size = self.block_size
            writes += [chunk.blocks[p // size] * size + p % size for p in range(chunk.start, chunk.stop)]
            used = -(-chunk.stop // size)
            if len(chunk.tokens) == 1:
                # Lengths within a factor of two share a gather: padding stays below the real work.
                decodes.setdefault(used.bit_length(), []).append((row, chunk))
            else:
                rows = slice(row, row + len(chunk.tokens))
                prefills.append(Prefill(rows, chunk.stop, torch.tensor(chunk.blocks[:used]), _mask(chunk)))
            row += len(chunk.tokens)
        groups = tuple(self._group(members) for members in decodes.values())
        return AttentionPlan(torch.tensor(writes), groups, tuple(prefills))

    def _group(self, members: list[tuple[int, Chunk]]) -> DecodeGroup:
        used = [-(-chunk.stop // self.block_size) for _, chunk in members]
        tables = torch.full((len(members), max(used)), self._padding)
        for table, (_, chunk), count in zip(tables, members, used, strict=True):
            table[:count] = torch.tensor(chunk.blocks[:count])
        lengths = torch.tensor([chunk.stop for _, chunk in members])
        mask = torch.arange(max(used) * self.block_size) < lengths[:, None]
        return DecodeGroup(torch.tensor([row for row, _ in members]), tables.flatten(), mask[:, None, None])

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """Writes this step's k and v, then attends.

        Args:
            layer: which layer's cache.
            q: [rows, heads, head_dim].
            k: [rows, kv_heads, head_dim].
            v: as k.
            plan: of this step's chunks.

        Returns:
            [rows, heads * head_dim].
        """
        keys, values = self._keys[layer], self._values[layer]
        keys.flatten(0, 1).index_copy_(0, plan.writes, k)
        values.flatten(0, 1).index_copy_(0, plan.writes, v)
        out = torch.empty_like(q)
        for group in plan.decodes:
            out[group.rows] = _decode(q[group.rows], keys, values, group)
        for prefill in plan.prefills:
            out[prefill.rows] = _prefill(q[prefill.rows], keys, values, prefill)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token and of similar length: rows [n], blocks [n * width], mask [n, 1, 1, positions]."""

    rows: torch.Tensor
    blocks: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """A sequence with several new tokens; `mask` [new, length] is None where plain causality says it all."""

    rows: slice
    length: int
    blocks: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's reads and writes: `writes` [rows] counts positions over all blocks."""

    writes: torch.Tensor
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[Prefill, ...]


def _mask(chunk: Chunk) -> torch.Tensor | None:
    if chunk.start == 0:
        return None
    return torch.ones(len(chunk.tokens), chunk.stop, dtype=torch.bool).tril(chunk.start)


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
    count, heads, head_dim = q.shape
    kv_heads = keys.shape[2]
    # The query heads of one KV head stand in the place of query positions: nothing is repeated.
    grouped = q.view(count, kv_heads, heads // kv_heads, head_dim)
    k = keys.index_select(0, group.blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    v = values.index_select(0, group.blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=group.mask).reshape(count, heads, head_dim)


def _prefill(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prefill: Prefill) -> torch.Tensor:
    k = keys.index_select(0, prefill.blocks).flatten(0, 1)[: prefill.length].transpose(0, 1)
    v = values.index_select(0, prefill.blocks).flatten(0, 1)[: prefill.length].transpose(0, 1)
    causal = prefill.mask is None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=prefill.mask, is_causal=causal, enable_gqa=True
    )
    return out[0].transpose(0, 1)
