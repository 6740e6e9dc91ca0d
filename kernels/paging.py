"""The sequence of each row of a step, and where its keys and values are in a paged cache."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels.memory import to_device


class KVSpan(NamedTuple):
    """New tokens of one sequence, which are adjacent rows of a step. A tuple, since a step makes one per sequence.

    Attributes:
        start: Position of the first token; all positions before it are in the cache.
        count: Number of new tokens.
        block_table: The sequence's blocks in order, at least enough for `start + count` positions; an array of int32 is
            copied at once, a list number by number.
    """

    start: int
    count: int  # type: ignore[assignment]  # a tuple's method
    block_table: Sequence[int]

    @property
    def stop(self) -> int:
        """Number of positions that the sequence has after the step."""
        return self.start + self.count


class PagedRows(NamedTuple):
    """A step's rows on a device, int64 [rows] each; see `Pages`."""

    positions: torch.Tensor
    slots: torch.Tensor


#: Fields of `Pages.table`'s last axis.
FIRST, COUNT, START, BLOCKS = range(4)


@dataclass(frozen=True, eq=False)
class Pages:
    """The paging of one step, built once and used by every layer.

    Attributes:
        block_size: Positions per block.
        spans: In the order of their rows.
        table: int32 [spans, 4]: first row, number of rows, position of the first row, and the start of the span's
            blocks in `blocks`.
        blocks: int32 [blocks in use]: the blocks of all spans, each as many as its positions need.
        positions: int32 [rows]: position of each row in its sequence.
        slots: int32 [rows]: where each row's keys and values are written, `block * block_size + offset`.
        end: One more than the highest block.
        memo: Values that backends compute once for all layers, by keys of their own.
    """

    block_size: int
    spans: tuple[KVSpan, ...]
    table: NDArray[np.int32]
    blocks: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    end: int
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, spans: Sequence[KVSpan], block_size: int) -> Pages:
        """Builds the paging of the sequences' spans.

        Raises:
            EngineFault: A span is empty, starts at a negative position or has too few blocks, or a block is negative.
        """
        table = np.zeros((len(spans), 4), np.int32)
        starts, counts, block_tables = zip(*spans, strict=True) if spans else ((), (), ())
        table[:, START], table[:, COUNT] = starts, counts
        used = (table[:, START] + table[:, COUNT] - 1) // block_size + 1
        if min(counts, default=1) < 1 or min(starts, default=0) < 0:
            raise _fault(spans, block_size)
        parts = map(_first_blocks, block_tables, used.tolist())
        blocks = np.frombuffer(bytearray().join(parts), np.int32)
        if len(blocks) < used.sum():
            raise _fault(spans, block_size)
        if blocks.min(initial=0) < 0:
            raise EngineFault(f"Block {blocks.min()} is negative; blocks are numbered from 0.")
        table[1:, FIRST] = table[:-1, COUNT].cumsum()
        table[1:, BLOCKS] = used[:-1].cumsum()
        of_rows, positions = table, table[:, START].copy()
        if max(counts, default=1) > 1:
            of_rows = np.repeat(table, table[:, COUNT], axis=0)
            row = np.arange(len(of_rows), dtype=np.int32)
            positions = of_rows[:, START] + (row - of_rows[:, FIRST])
        block, offset = np.divmod(positions, np.int32(block_size))
        slots = blocks[of_rows[:, BLOCKS] + block] * np.int32(block_size) + offset
        return cls(block_size, tuple(spans), table, blocks, positions, slots, int(blocks.max(initial=-1)) + 1)

    @property
    def rows(self) -> int:
        """Number of rows of the step."""
        return len(self.positions)

    def on(self, device: torch.device) -> PagedRows:
        """The rows' positions and slots on a device."""
        rows: PagedRows | None = self.memo.get(device)
        if rows is None:
            rows = self.memo[device] = PagedRows(
                *to_device(np.stack([self.positions, self.slots]).astype(np.int64), device)
            )
        return rows

    def check(self, rows: int, blocks: int, block_size: int) -> None:
        """Checks that the paging is for `rows` rows over a cache of `blocks` blocks.

        Raises:
            EngineFault: It is not, so that a kernel would write out of bounds.
        """
        if rows != len(self.positions) or block_size != self.block_size or blocks < self.end:
            raise EngineFault(
                f"The paging has {self.rows} rows and {self.end} blocks of {self.block_size}; the step has {rows} rows "
                f"and a cache of {blocks} blocks of {block_size}."
            )


def _first_blocks(block_table: Sequence[int], count: int) -> array[int]:
    """The first blocks of a table as int32."""
    return block_table[:count] if isinstance(block_table, array) else array("i", block_table[:count])


def _fault(spans: Sequence[KVSpan], block_size: int) -> EngineFault:
    """The error about the first span that is not valid."""
    needed = [-(-span.stop // block_size) for span in spans]
    number = next(
        index
        for index, span in enumerate(spans)
        if span.count < 1 or span.start < 0 or len(span.block_table) < needed[index]
    )
    start, count, block_table = spans[number]
    return EngineFault(
        f"Span {number} has {len(block_table)} blocks of {block_size} for {count} rows from position {start}; it needs "
        f"{needed[number]} blocks, at least one row and no negative position."
    )
