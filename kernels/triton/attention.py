"""Paged attention on a GPU: sequences with one new row by kernels of our own, those with several by torch.

Why not torch's: `torch.nn.attention.varlen` takes a block table in recent versions alone (2.13), and FlashAttention 2
beneath it pages of 256 positions alone. `scaled_dot_product_attention` takes no block table: every step would copy all
keys and values of its sequences, by lengths that the host must know, and no CUDA graph could hold it.

Each sequence's positions are cut into splits (flash-decoding: Dao et al. 2023), which programs of `attend` go through
at once, for all query heads of one KV head together; `combine` adds up what they found. The grid is (sequences, KV
heads, splits) and holds for any lengths: these, and the block tables, are read on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels import torch_backend
from loramill.kernels.backend import LayerKV
from loramill.kernels.memory import copy_to_device, to_device
from loramill.kernels.paging import BLOCKS, COUNT, FIRST, START, KVSpan, PagedRows, Pages
from loramill.kernels.triton.attention_kernels import attend, combine
from loramill.kernels.triton.plans import Launch

#: Programs that keep an H100's 132 multiprocessors' memory queues full, about 4 each.
PROGRAMS = 512
#: Splits of a sequence: some even for many sequences, lest a long one hold up the step; a power of two.
SPLITS = (8, 64)
#: Bytes of keys, and as many of values, that a program reads at a time.
TILE = 16 << 10
#: What a window is where there is none.
_ALL = 2**31 - 1


def attention(
    qkv: torch.Tensor, heads: int, kv: LayerKV, pages: Pages, scale: float, window: int | None = None
) -> torch.Tensor:
    """Each row's queries over its sequence's keys; returns [rows, heads * head_dim]; see `Backend.attention`."""
    pages.check(len(qkv), len(kv.keys), kv.block_size)
    out = torch.empty(len(qkv), heads * kv.head_dim, dtype=qkv.dtype, device=qkv.device)
    decodes = _decodes(pages, qkv.device)
    if len(decodes.table):
        decode(qkv, out, heads, kv, decodes, scale, window)
    torch_backend.attend_prefills(qkv, out, heads, kv, pages, scale, window)
    return out


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences with one new row, on the device.

    Attributes:
        table: int32 [sequences, 3]: the row, positions up to it and with it (0: nothing to do), and where in `blocks`
            its own begin.
        blocks: int32 [...], of all.
    """

    table: torch.Tensor
    blocks: torch.Tensor


class StaticPages:
    """The paging of decode steps in buffers of fixed size, for CUDA graphs.

    Call the step once with `pages`, so that its kernels are compiled; capture it with `pages`; then, before each replay
    and on the stream of the replay, `refresh` with the paging to come. Rows that it doesn't have write to the scratch
    block, and read nothing.

    Attributes:
        pages: what `rope_write` and `attention` take while a graph is captured.
    """

    def __init__(self, *, rows: int, blocks: int, block_size: int, scratch: int, device: torch.device) -> None:
        """Sizes the buffers.

        Args:
            rows: at most, each of a sequence of its own.
            blocks: of all sequences together, at most; shared ones count each time.
            block_size: positions of a block.
            scratch: a block that no sequence has; theirs are those before it.
            device: where the graph runs.
        """
        self.pages = Pages.of([KVSpan(0, 1, [scratch])] * rows, block_size)
        self._scratch = scratch
        self._numbers = torch.empty(2, rows, dtype=torch.int64, device=device)
        self._table = torch.empty(3 * rows + blocks, dtype=torch.int32, device=device)
        # Of the tensors: "cuda" is another key than "cuda:0".
        device = self._numbers.device
        self.pages.memo[device] = PagedRows(*self._numbers)
        self.pages.memo[DecodeBatch, device] = DecodeBatch(
            self._table[: 3 * rows].view(rows, 3), self._table[3 * rows :]
        )
        # What is launched before the first refresh must write to the scratch block, too.
        self.refresh(Pages.of([], block_size))

    def refresh(self, pages: Pages) -> None:
        """Replaces the paging.

        Raises:
            EngineFault: it is larger than the buffers, has a sequence with several rows, or the scratch block.
        """
        own = self.pages
        pages.check(pages.rows, self._scratch, own.block_size)
        room = len(self._table) - 3 * own.rows
        if pages.rows > own.rows or len(pages.spans) != pages.rows or len(pages.blocks) > room:
            raise EngineFault(
                f"A graph for {own.rows} decodes over {room} blocks can't run {pages.rows} rows of {len(pages.spans)} "
                f"sequences over {len(pages.blocks)} blocks: take the graph of a larger bucket, or none."
            )
        numbers = np.zeros((2, own.rows), dtype=np.int64)
        numbers[1] = own.slots
        numbers[:, : pages.rows] = pages.positions, pages.slots
        table = np.zeros(3 * own.rows + len(pages.blocks), dtype=np.int32)
        table[: 3 * pages.rows] = _decode_table(pages).reshape(-1)
        table[3 * own.rows :] = pages.blocks
        copy_to_device(numbers, self._numbers)
        copy_to_device(table, self._table[: len(table)])


def decode(
    qkv: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    kv: LayerKV,
    decodes: DecodeBatch,
    scale: float,
    window: int | None,
) -> None:
    """Writes the sequences' rows of out [rows, heads * head_dim]; what else is there stays."""
    sequences, group = len(decodes.table), heads // kv.kv_heads
    launch = attend_launch(group, kv.head_dim, kv.block_size, qkv.itemsize)
    splits = splits_of(sequences, kv.kv_heads)
    shape = (sequences, kv.kv_heads, group, splits)
    totals = torch.empty(*shape, launch.constants["DIM"], dtype=torch.float32, device=qkv.device)
    peaks = torch.empty(*shape, 2, dtype=torch.float32, device=qkv.device)
    seen = _ALL if window is None else window
    # Scores in units of log 2: exp2 is one instruction.
    scores = scale / math.log(2)
    attend[sequences, kv.kv_heads, splits](
        qkv, kv.keys, kv.values, totals, peaks, decodes.table, decodes.blocks, scores, seen, qkv.stride(0),
        **launch.constants, **launch.options,
    )  # fmt: skip
    launch = combine_launch(group, kv.head_dim, splits, launch.constants["KEYS"])
    combine[sequences, kv.kv_heads, group](
        out, totals, peaks, decodes.table, seen, out.stride(0), **launch.constants, **launch.options
    )


@cache
def attend_launch(group: int, head_dim: int, block_size: int, itemsize: int) -> Launch:
    """Of `attend`, for `group` query heads a KV head and numbers of `itemsize` bytes."""
    # The matrix units take 16 rows and columns at least.
    dim = max(16, triton.next_power_of_2(head_dim))
    constants = {
        "GROUP": group,
        "GROUPS": max(16, triton.next_power_of_2(group)),
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "KEYS": max(16, min(128, TILE // (dim * itemsize))),
    }
    # Without the matrix units, which don't take float32, four warps would have too few registers.
    return Launch("attend", constants, {"num_warps": 8 if itemsize == 4 else 4, "num_stages": 2})


@cache
def combine_launch(group: int, head_dim: int, splits: int, keys: int) -> Launch:
    """Of `combine`, after an `attend` with tiles of `keys` positions."""
    dim = max(16, triton.next_power_of_2(head_dim))
    constants = {"GROUP": group, "HEAD_DIM": head_dim, "DIM": dim, "KEYS": keys, "SPLITS": splits}
    return Launch("combine", constants, {"num_warps": 4, "num_stages": 1})


def splits_of(sequences: int, kv_heads: int) -> int:
    """Into how many splits a sequence is cut, at most: as few as fill the GPU."""
    least, most = SPLITS
    return int(min(most, max(least, triton.next_power_of_2(triton.cdiv(PROGRAMS, sequences * kv_heads)))))


def _decodes(pages: Pages, device: torch.device) -> DecodeBatch:
    key = (DecodeBatch, device)
    if key not in pages.memo:
        table = _decode_table(pages)
        numbers = to_device(np.concatenate([table.reshape(-1), pages.blocks]), device)
        pages.memo[key] = DecodeBatch(numbers[: table.size].view(-1, 3), numbers[table.size :])
    decodes: DecodeBatch = pages.memo[key]
    return decodes


def _decode_table(pages: Pages) -> NDArray[np.int32]:
    """The table of `Decodes`."""
    single = pages.table[pages.table[:, COUNT] == 1]
    return np.stack([single[:, FIRST], single[:, START] + 1, single[:, BLOCKS]], axis=1)
