"""Tiles, warps and splits of a step: a small table, by the rows of its runs, rank and dimensions.

The numbers follow from bytes in flight and from what compiles for sm_90 without spilling; `loramill-bench kernels
--device cuda` shows their cost on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Shrink:
    """How h = x A^T is divided.

    Attributes:
        ranks: Ranks of an adapter per tile; a larger adapter has several tiles.
        depth: Bytes of a row of x per iteration.
        splits: Maximum number of programs that the sum over d_in is divided into.
        warps, stages: Of a program.
    """

    ranks: int
    depth: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Expand:
    """How y + h B^T is divided.

    Attributes:
        ranks: Ranks per iteration.
        width: Columns per program.
        warps: Of a program.
        registers: Maximum number of registers per thread; None: ptxas chooses.
    """

    ranks: int
    width: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How a step is divided; a tile has up to `rows` rows of a run. With 1, the matrix units are not used."""

    rows: int
    shrink: Shrink
    expand: Expand


@dataclass(frozen=True, slots=True)
class Fused:
    """Shrink and expand in one launch, in which each block of columns repeats the shrink.

    Attributes:
        tiles, ranks, d_in: Upper limits of its use: A is read again for each block of columns, sequentially.
        depth: Bytes of a row of x per iteration.
        width: Columns per program.
        warps: Of a program.
    """

    tiles: int
    ranks: int
    d_in: int
    depth: int
    width: int
    warps: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled and launched.

    Attributes:
        kernel: Its name in `loramill.kernels.triton.kernels`.
        constants: The constexpr arguments that the plan determines.
        options: Triton's options: warps, stages and registers.
    """

    kernel: str
    constants: Mapping[str, int]
    options: Mapping[str, int]


#: Registers per thread of a one-row program: a multiprocessor's 65,536, divided among 4 programs of 128 threads.
#: Without a limit, ptxas assigns 80 registers, for more programs, and spills one.
REGISTERS = 128

#: (rows of the longest run up to, ranks up to, plan); the first that fits is used.
#: The following were rejected since they spill registers: an expand of 32 ranks per iteration (16 rows on sm_120, 64
#: rows everywhere); a shrink of 64 ranks and 64 rows with 4 warps (sm_89 and sm_120, which lack wgmma); and an expand
#: of 64 rows without a number of registers, for which ptxas chooses 128.
TABLE: tuple[tuple[float, int, TilePlan], ...] = (
    (3, 256, TilePlan(1, Shrink(16, 512, 16, 4, 1), Expand(16, 512, 4, REGISTERS))),
    (32, 16, TilePlan(16, Shrink(16, 256, 16, 4, 4), Expand(16, 128, 4))),
    (32, 256, TilePlan(16, Shrink(64, 128, 16, 4, 4), Expand(16, 128, 4))),
    (math.inf, 16, TilePlan(64, Shrink(16, 128, 8, 4, 4), Expand(16, 128, 8, 255))),
    (math.inf, 256, TilePlan(64, Shrink(64, 128, 8, 8, 4), Expand(16, 128, 8, 255))),
)

FUSED = Fused(tiles=32, ranks=16, d_in=2048, depth=2048, width=512, warps=8)

#: Number of programs that keep the memory queues of an H100's 132 multiprocessors full, about 4 each.
PROGRAMS = 512

#: Up to this many rows, a graph, whose runs are unknown when it is captured, has tiles of one row.
STATIC_ROWS = 32


def choose(longest: int, rank: int) -> TilePlan:
    """The plan for a step whose longest run has `longest` rows and whose largest adapter has rank `rank`."""
    return next(plan for rows, ranks, plan in TABLE if longest <= rows and rank <= ranks)


def choose_static(rows: int, rank: int) -> TilePlan:
    """The plan for a graph of up to `rows` rows in runs of any length, and ranks up to `rank`."""
    return choose(1 if rows <= STATIC_ROWS else 16, rank)


def fuses(plan: TilePlan, tiles: int, rank: int, d_in: int) -> bool:
    """Whether shrink and expand run in one launch."""
    return plan.rows == 1 and tiles <= FUSED.tiles and rank <= FUSED.ranks and d_in <= FUSED.d_in


def steps(d_in: int, itemsize: int, plan: TilePlan, programs: int) -> int:
    """Iterations per split of the sum over d_in, such that the splits fill the GPU.

    The result is a power of two, so that few variants are compiled.

    Args:
        d_in: Number of terms of the sum.
        itemsize: Bytes per term.
        plan: The step's plan.
        programs: Number of programs without splits.
    """
    splits = min(plan.shrink.splits, max(1, PROGRAMS // programs))
    return _power_of_two(-(-d_in * itemsize // (plan.shrink.depth * splits)))


@cache
def shrink(plan: TilePlan, itemsize: int, steps: int) -> Launch:
    """The launch of a shrink of rows of `itemsize` bytes per number."""
    cut = plan.shrink
    constants = {"RANKS": cut.ranks, "DEPTH": cut.depth // itemsize, "STEPS": steps}
    return _launch("shrink", plan, constants, cut.warps, cut.stages, REGISTERS if plan.rows == 1 else None)


@cache
def expand(plan: TilePlan) -> Launch:
    """The launch of an expand."""
    cut = plan.expand
    constants = {"SPLITS": plan.shrink.splits, "RANKS": cut.ranks, "WIDTH": cut.width}
    return _launch("expand", plan, constants, cut.warps, 1, cut.registers)


@cache
def fused(d_in: int, itemsize: int) -> Launch:
    """The launch of a fused shrink and expand."""
    steps = _power_of_two(-(-d_in * itemsize // FUSED.depth))
    constants = {"RANKS": FUSED.ranks, "DEPTH": FUSED.depth // itemsize, "STEPS": steps, "WIDTH": FUSED.width}
    return Launch("fused_row", constants, {"num_warps": FUSED.warps, "num_stages": 1})


#: The launch of an embedding's adapters.
EMBED = Launch("embed_row", {"RANKS": 8, "WIDTH": 512}, {"num_warps": 4})


def _launch(
    kernel: str, plan: TilePlan, constants: dict[str, int], warps: int, stages: int, registers: int | None
) -> Launch:
    options = {"num_warps": warps, "num_stages": stages}
    if registers is not None:
        options["maxnreg"] = registers
    if plan.rows == 1:
        return Launch(f"{kernel}_row", constants, options)
    return Launch(f"{kernel}_rows", {**constants, "ROWS": plan.rows}, options)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
