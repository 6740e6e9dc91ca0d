"""Paged attention on a GPU: our own kernels for sequences with one new row, torch's for those with several.

Why not torch's for all: its FlashAttention 2 takes block tables only of pages of 256 positions. Without a block table
every step would copy all keys and values of its sequences, by lengths that the host must know, which no CUDA graph can
capture. A prompt's copy is small next to its computation.

Each sequence's positions are divided into splits (flash-decoding: Dao et al. 2023), which programs of `attend` process
in parallel, for all query heads of one KV head together; `combine` adds up their results. The grid is (sequences, KV
heads, splits) and is valid for any lengths: lengths and block tables are read on the device.
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
from loramill.kernels.attention import paged
from loramill.kernels.backend import LayerKV
from loramill.kernels.memory import copy_to_device, to_device
from loramill.kernels.paging import BLOCKS, COUNT, FIRST, START, KVSpan, PagedRows, Pages
from loramill.kernels.triton.attention_kernels import attend, combine
from loramill.kernels.triton.plans import Launch

#: Number of programs that keep the memory queues of an H100's 132 multiprocessors full, about 4 each.
PROGRAMS = 512
#: Minimum and maximum splits of a sequence, powers of two; not 1, so that one long sequence does not delay the step.
SPLITS = (8, 64)
#: Bytes of keys, and as many of values, that a program reads per iteration.
TILE = 16 << 10
#: Bytes of shared memory of a multiprocessor from which programs have three stages instead of two, for 16-bit numbers.
#: Three take 70 to 76 KiB: 3 programs per multiprocessor of an H100 (228 KiB), as many as 168 registers per thread
#: allow, and 2 of an A100 (164 KiB). Two take 38 to 44 KiB: 2 programs where there are 100 KiB (sm_86, 89 and 120),
#: which would hold one with three stages. Tiles of 32 KiB would take 136 KiB with three stages, one program per
#: multiprocessor: nothing would be read while it begins and ends, with 1,024 positions after every tile.
DEEP = 160 << 10
#: The window of a layer without one.
_ALL = 2**31 - 1
#: Added to the columns FIRST, START and BLOCKS: a row attends to its own position and to all before it.
_WITH_OWN_POSITION = np.array([0, 1, 0], np.int32)


def attention(
    qkv: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of each row to its sequence's positions; see `Backend.attention`."""
    pages.check(len(qkv), len(kv.keys), kv.block_size)
    out = torch.empty(len(qkv), heads * kv.head_dim, dtype=qkv.dtype, device=qkv.device)
    decodes = _decodes(pages, qkv.device)
    if len(decodes.table):
        decode(qkv, out, heads, kv, decodes, scale, window, cap)
    paged.attend_prefills(qkv, out, heads, kv, pages, scale, window, cap)
    return out


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences with one new row, on the device.

    Attributes:
        table: int32 [sequences, 3]: the row, the number of positions up to and including it (0: nothing to do), and the
            start of its blocks in `blocks`.
        blocks: int32 [...]: the blocks of all sequences.
    """

    table: torch.Tensor
    blocks: torch.Tensor


class StaticPages:
    """The paging of decode steps in buffers of fixed size, for CUDA graphs.

    Call the step once with `pages`, so that its kernels are compiled; capture it with `pages`; then, before each replay
    and on the stream of the replay, call `refresh` with the next paging. Unused rows write to the scratch block and
    read nothing.

    Attributes:
        pages: What `rope_write` and `attention` take while a graph is captured.
    """

    def __init__(self, *, rows: int, blocks: int, block_size: int, scratch: int, device: torch.device) -> None:
        """Allocates the buffers.

        Args:
            rows: Maximum number of rows, each of its own sequence.
            blocks: Maximum number of blocks of all sequences together; shared ones count each time.
            block_size: Positions per block.
            scratch: A block that no sequence has; the sequences' blocks precede it.
            device: Where the graph runs.
        """
        self.pages = Pages.of([KVSpan(0, 1, [scratch])] * rows, block_size)
        self._scratch = scratch
        self._room = blocks
        # Positions and slots in int64, the decodes' table, and their blocks: adjacent, so that one copy replaces them.
        self._numbers = torch.empty(7 * rows + blocks, dtype=torch.int32, device=device)
        wide, table, listed = torch.split(self._numbers, [4 * rows, 3 * rows, blocks])
        # The tensors' device, since "cuda" and "cuda:0" are different keys.
        device = self._numbers.device
        self.pages.memo[device] = PagedRows(*wide.view(torch.int64).view(2, rows))
        self.pages.memo[DecodeBatch, device] = DecodeBatch(table.view(rows, 3), listed)
        # Launches before the first refresh must write to the scratch block, too.
        self.refresh(Pages.of([], block_size))

    def refresh(self, pages: Pages) -> None:
        """Replaces the paging.

        Raises:
            EngineFault: It is larger than the buffers, or has a sequence with several rows or the scratch block.
        """
        own, rows = self.pages, self.pages.rows
        pages.check(pages.rows, self._scratch, own.block_size)
        if pages.rows > rows or len(pages.spans) != pages.rows or len(pages.blocks) > self._room:
            raise EngineFault(
                f"A graph for {rows} decodes over {self._room} blocks can't run {pages.rows} rows of "
                f"{len(pages.spans)} sequences over {len(pages.blocks)} blocks: use the graph of a larger bucket, or "
                "none."
            )
        numbers = np.zeros(7 * rows + len(pages.blocks), dtype=np.int32)
        wide = numbers[: 4 * rows].view(np.int64).reshape(2, rows)
        wide[1] = own.slots
        wide[:, : pages.rows] = pages.positions, pages.slots
        numbers[4 * rows : 4 * rows + 3 * pages.rows] = _decode_table(pages.table).reshape(-1)
        numbers[7 * rows :] = pages.blocks
        copy_to_device(numbers, self._numbers[: len(numbers)])


def decode(
    qkv: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    kv: LayerKV,
    decodes: DecodeBatch,
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> None:
    """Writes the sequences' rows of out [rows, heads * head_dim]; other rows are unchanged."""
    sequences, group = len(decodes.table), heads // kv.kv_heads
    launch = attend_launch(group, kv.head_dim, kv.block_size, qkv.itemsize, shared_memory(qkv.device), cap)
    splits = splits_of(sequences, kv.kv_heads)
    shape = (sequences, kv.kv_heads, group, splits)
    totals = torch.empty(*shape, launch.constants["DIM"], dtype=torch.float32, device=qkv.device)
    peaks = torch.empty(*shape, 2, dtype=torch.float32, device=qkv.device)
    seen = _ALL if window is None else window
    # Scores are scaled by 1 / log 2, since exp2 is one instruction.
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
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; 0 for a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return size


@cache
def attend_launch(
    group: int, head_dim: int, block_size: int, itemsize: int, shared: int, cap: float | None = None
) -> Launch:
    """The launch of `attend`, for `group` query heads per KV head and numbers of `itemsize` bytes.

    Args:
        shared: Bytes of shared memory of a multiprocessor.
        cap: Bound of the scores; None: they are not capped.
    """
    # The matrix units take at least 16 rows and columns.
    dim = max(16, triton.next_power_of_2(head_dim))
    constants = {
        "GROUP": group,
        "GROUPS": max(16, triton.next_power_of_2(group)),
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "KEYS": max(16, min(128, TILE // (dim * itemsize))),
        "CAP": cap or 0.0,
    }
    stages = 3 if itemsize == 2 and shared >= DEEP else 2
    # float32 does not use the matrix units: 4 warps would have too few registers, and so would 8 on sm_100 for more
    # than 16 query heads.
    warps = constants["GROUPS"] // 2 if itemsize == 4 else 4
    return Launch("attend", constants, {"num_warps": warps, "num_stages": stages})


@cache
def combine_launch(group: int, head_dim: int, splits: int, keys: int) -> Launch:
    """The launch of `combine`, after an `attend` with tiles of `keys` positions."""
    dim = max(16, triton.next_power_of_2(head_dim))
    constants = {"GROUP": group, "HEAD_DIM": head_dim, "DIM": dim, "KEYS": keys, "SPLITS": splits}
    return Launch("combine", constants, {"num_warps": 4, "num_stages": 1})


def splits_of(sequences: int, kv_heads: int) -> int:
    """Maximum number of splits of a sequence: as few as fill the GPU."""
    minimum, maximum = SPLITS
    return int(min(maximum, max(minimum, triton.next_power_of_2(triton.cdiv(PROGRAMS, sequences * kv_heads)))))


def _decodes(pages: Pages, device: torch.device) -> DecodeBatch:
    key = (DecodeBatch, device)
    if key not in pages.memo:
        table = _decode_table(pages.table[pages.table[:, COUNT] == 1])
        numbers = to_device(np.concatenate([table.reshape(-1), pages.blocks]), device)
        pages.memo[key] = DecodeBatch(numbers[: table.size].view(-1, 3), numbers[table.size :])
    decodes: DecodeBatch = pages.memo[key]
    return decodes


def _decode_table(table: NDArray[np.int32]) -> NDArray[np.int32]:
    """The table of `DecodeBatch` from lines of `Pages.table` that have one row each."""
    return table[:, (FIRST, START, BLOCKS)] + _WITH_OWN_POSITION
