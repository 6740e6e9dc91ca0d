"""Which tiles, warps and splits a step uses: a small table, keyed on the rows of its runs, on rank and on dimensions.

The numbers come from bytes in flight and from what compiles for sm_90 without spilling; `loramill-bench kernels
--device cuda` shows what they cost on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Shrink:
    """How h = x A^T is cut up.

    Attributes:
        ranks: of an adapter in a tile; a larger adapter has several tiles.
        depth: bytes of a row of x that a step multiplies.
        splits: into how many programs the sum over d_in may be cut.
        warps, stages: of a program.
    """

    ranks: int
    depth: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Expand:
    """How y + h B^T is cut up.

    Attributes:
        ranks: a step.
        width: columns a program.
        warps: of a program.
    """

    ranks: int
    width: int
    warps: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How a step is cut up; `rows` of a run make a tile, and with 1 the matrix units are left alone."""

    rows: int
    shrink: Shrink
    expand: Expand


@dataclass(frozen=True, slots=True)
class Fused:
    """Shrink and expand in one launch, where each block of columns shrinks for itself.

    Attributes:
        tiles, ranks, d_in: it is used up to these: A is read once more for each block of columns, and in sequence.
        depth: bytes of a row of x that a step multiplies.
        width: columns a program.
        warps: of a program.
    """

    tiles: int
    ranks: int
    d_in: int
    depth: int
    width: int
    warps: int


@dataclass(frozen=True, slots=True)
class Launch:
    """What a kernel is compiled with.

    Attributes:
        kernel: its name in `loramill.kernels.triton.kernels`.
        constants: those of its constexpr arguments that the plan decides.
        options: Triton's: warps, stages and registers.
    """

    kernel: str
    constants: Mapping[str, int]
    options: Mapping[str, int]


#: (rows of the longest run up to, ranks up to, plan); the first that fits is used.
#: With 64 rows, an expand of 32 ranks a step spills where widths are odd.
TABLE: tuple[tuple[float, int, TilePlan], ...] = (
    (3, 256, TilePlan(1, Shrink(16, 512, 16, 4, 1), Expand(16, 512, 4))),
    (32, 16, TilePlan(16, Shrink(16, 256, 16, 4, 4), Expand(16, 128, 4))),
    (32, 256, TilePlan(16, Shrink(64, 128, 16, 4, 4), Expand(32, 128, 4))),
    (math.inf, 16, TilePlan(64, Shrink(16, 128, 8, 4, 4), Expand(16, 128, 8))),
    (math.inf, 256, TilePlan(64, Shrink(64, 128, 8, 4, 4), Expand(16, 128, 8))),
)

FUSED = Fused(tiles=32, ranks=16, d_in=2048, depth=2048, width=512, warps=8)

#: Programs that keep an H100's 132 multiprocessors' memory queues full, about 4 each.
PROGRAMS = 512

#: Registers that a thread of a one-row program may use: the 65,536 of a multiprocessor over 4 programs of 128 threads.
#: Without a limit, ptxas takes 80 for more programs and spills one.
REGISTERS = 128

#: Up to so many rows a graph, whose runs aren't known when it is captured, has tiles of one row.
STATIC_ROWS = 32


def choose(longest: int, rank: int) -> TilePlan:
    """The plan for a step whose longest run has `longest` rows and whose largest adapter has rank `rank`."""
    return next(plan for rows, ranks, plan in TABLE if longest <= rows and rank <= ranks)


def choose_static(rows: int, rank: int) -> TilePlan:
    """The plan for a graph of up to `rows` rows in runs of any length, and ranks up to `rank`."""
    return choose(1 if rows <= STATIC_ROWS else 16, rank)


def fuses(plan: TilePlan, tiles: int, rank: int, d_in: int) -> bool:
    """Whether one launch does it all."""
    return plan.rows == 1 and tiles <= FUSED.tiles and rank <= FUSED.ranks and d_in <= FUSED.d_in


def steps(d_in: int, itemsize: int, plan: TilePlan, programs: int) -> int:
    """Steps of each split of the sum over d_in: as few as fill the GPU; a power of two, so that few variants compile.

    Args:
        d_in: terms of the sum.
        itemsize: bytes of a term.
        plan: of the step.
        programs: that there are before the sum is split.
    """
    splits = min(plan.shrink.splits, max(1, PROGRAMS // programs))
    return _power_of_two(-(-d_in * itemsize // (plan.shrink.depth * splits)))


@cache
def shrink(plan: TilePlan, itemsize: int, steps: int) -> Launch:
    """The shrink of weights of `itemsize` bytes."""
    cut = plan.shrink
    constants = {"RANKS": cut.ranks, "DEPTH": cut.depth // itemsize, "STEPS": steps}
    return _launch("shrink", plan, constants, cut.warps, cut.stages)


@cache
def expand(plan: TilePlan) -> Launch:
    """The expand."""
    cut = plan.expand
    constants = {"SPLITS": plan.shrink.splits, "RANKS": cut.ranks, "WIDTH": cut.width}
    return _launch("expand", plan, constants, cut.warps, 1)


@cache
def fused(d_in: int, itemsize: int) -> Launch:
    """The launch that does it all."""
    steps = _power_of_two(-(-d_in * itemsize // FUSED.depth))
    constants = {"RANKS": FUSED.ranks, "DEPTH": FUSED.depth // itemsize, "STEPS": steps, "WIDTH": FUSED.width}
    return Launch("fused_row", constants, {"num_warps": FUSED.warps, "num_stages": 1})


def _launch(kernel: str, plan: TilePlan, constants: dict[str, int], warps: int, stages: int) -> Launch:
    options = {"num_warps": warps, "num_stages": stages}
    if plan.rows == 1:
        return Launch(f"{kernel}_row", constants, {**options, "maxnreg": REGISTERS})
    return Launch(f"{kernel}_rows", {**constants, "ROWS": plan.rows}, options)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
