"""Host side of multi-LoRA on a GPU: the work of a step is computed once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels.adapters.packing import RANK, Layout, Site
from loramill.kernels.adapters.slab import SiteSlab, Slab
from loramill.kernels.backend import Weight
from loramill.kernels.batch import Batch
from loramill.kernels.memory import ALIGNMENT, aligned, copy_to_device
from loramill.kernels.triton import kernels, plans
from loramill.kernels.triton.quantized import linear

#: b is stored as [r, d_out], so that columns are adjacent and aligned whatever the rank, and need no padding.
layout: Layout = Layout(torch.Tensor.contiguous, lambda b: b.T.contiguous())


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Applies each run's adapter; see `loramill.kernels.lora` for the contract.

    All work is launched on the current stream of the current device, without synchronization. The first call for a
    step copies its tiles to the device; a call captured into a CUDA graph takes `StaticPlan.batch`.

    Args:
        x: [rows, d_in] in the slab's dtype, or in any floating one if that is int8; a row's elements are adjacent.
        y: [rows, sum of the site's widths], likewise; changed in place.
        slab: A site of a slab with this module's layout.
        batch: The adapter of each row.

    Raises:
        EngineFault: A handle is stale, the slab has another layout, or x or y has another shape or dtype.
    """
    slab.slab.check(batch)
    work = batch.memo.get((StepWork, slab.slab))
    if work is None:
        if not batch.runs:
            return
        work = batch.memo[StepWork, slab.slab] = build_work(slab.slab, batch)
    if work.count:
        site = work.resident.sites[slab.index]
        _check(x, y, site, work, x.dtype if slab.slab.dtype == torch.int8 else slab.slab.dtype)
        if plans.fuses(work.plan, work.count, work.rank, site.d_in):
            fused(x, y, site, work)
        else:
            shrink_and_expand(x, y, site, work)


def adapted_linear(x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
    """`linear`, then `lora` on its result."""
    y = linear(x, weight)
    lora(x, y, slab, batch)
    return y


@dataclass(frozen=True, slots=True)
class ResidentSite:
    """One site's data as the kernels take it.

    Attributes:
        d_in: Number of columns of x.
        columns: Number of columns of y.
        modules: Number of modules of the site.
        widest: Number of columns of the widest module.
        align_y: A divisor of the first columns of all modules, at most 16.
        weights: The slab's arena as elements of its dtype.
        gains: The slab's arena as float32, which gains and the scales of int8 are.
        table: int64 [slots, modules of the widest site, 4], on the device.
        starts: int32 [modules + 1], on the device: the first column of each module, and the end.
    """

    d_in: int
    columns: int
    modules: int
    widest: int
    align_y: int
    weights: torch.Tensor
    gains: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor


class ResidentSlab:
    """A slab's data as the kernels take it.

    Attributes:
        sites: The data of each site.
        ranks: int64 [slots]: the largest rank of each adapter.
    """

    def __init__(self, slab: Slab) -> None:
        if slab.layout != layout:
            raise EngineFault("The slab has another backend's layout; create it with loramill.kernels.triton.layout.")
        self._table = torch.zeros(slab.table.shape, dtype=torch.int64, device=slab.arena.device)
        self._units = np.array([slab.dtype.itemsize, slab.dtype.itemsize, torch.float32.itemsize, 1])
        self._changes = 0
        self.ranks = np.zeros(slab.table.shape[1], dtype=np.int64)
        # Adapters take whole cache lines: none is in the partial line at the arena's end.
        arena = slab.arena[: slab.arena.numel() // ALIGNMENT * ALIGNMENT]
        weights, gains = arena.view(slab.dtype), arena.view(torch.float32)
        self.sites = [_site(view.site, weights, gains, self._table[view.index]) for view in slab.views]

    def refresh(self, slab: Slab) -> None:
        """Copies the table if a slot changed; kernels launched earlier still read the old one, by stream order."""
        changes = slab.changes
        if changes != self._changes:
            table = slab.table // self._units
            self.ranks = table[..., RANK].max(axis=(0, 2), initial=0)
            copy_to_device(table, self._table)
            self._changes = changes


@dataclass(frozen=True, slots=True)
class StepWork:
    """A step, divided into tiles.

    Attributes:
        resident: The slab.
        plan: How the step is divided.
        tiles: int32 [tiles, 4], on the device: slot (-1: none), first row, row after the last, first rank.
        count: Number of tiles that start at rank 0; they come first, and are those that the expand processes.
        rows: Number of rows of the batch.
        rank: The largest rank.
    """

    resident: ResidentSlab
    plan: plans.TilePlan
    tiles: torch.Tensor
    count: int
    rows: int
    rank: int


class StaticPlan:
    """A step's work in buffers of fixed size, for CUDA graphs.

    Call `lora` once with `batch`, so that its kernels are compiled; capture it with `batch`; then, before each replay
    and on the stream of the replay, call `refresh` with the next batch. Tiles that it does not need end at once.

    Attributes:
        batch: What `lora` takes while a graph is captured.
    """

    def __init__(self, slab: Slab, *, rows: int, rank: int) -> None:
        """Allocates buffers for up to `rows` rows, in runs of any length, of adapters with ranks up to `rank`."""
        plan = plans.choose_static(rows, rank)
        self._slab, self._rows, self._rank = slab, rows, rank
        self._more = rows * (-(-rank // plan.shrink.ranks) - 1)
        tiles = torch.full((rows + self._more, 4), -1, dtype=torch.int32, device=slab.arena.device)
        self._work = StepWork(resident_slab(slab), plan, tiles, rows, rows, rank)
        self.batch = Batch(rows, ())
        self.batch.memo[StepWork, slab] = self._work
        # The slab's number of changes and the runs for which the tiles were computed.
        self._content: tuple[int, bytes] | None = None

    def refresh(self, batch: Batch) -> None:
        """Replaces the work by that of a batch.

        Raises:
            EngineFault: A handle is stale, or the batch is larger than the buffers.
        """
        self._slab.check(batch)
        content = self._slab.changes, batch.segments.tobytes()
        if content == self._content and batch.rows <= self._rows:
            return
        resident = self._work.resident
        resident.refresh(self._slab)
        ranks = resident.ranks[batch.segments[:, 0]]
        if batch.rows > self._rows or ranks.max(initial=0) > self._rank:
            raise EngineFault(
                f"A graph for {self._rows} rows of rank {self._rank} can't run {batch.rows} rows of rank "
                f"{ranks.max(initial=0)}: use the graph of a larger bucket."
            )
        plan = self._work.plan
        first, more = tile_list(batch.segments, ranks, plan.rows, plan.shrink.ranks)
        tiles = np.full(self._work.tiles.shape, -1, dtype=np.int32)
        tiles[: len(first)] = first
        tiles[self._rows : self._rows + len(more)] = more
        copy_to_device(tiles, self._work.tiles)
        self._content = content


def tile_list(
    segments: NDArray[np.int32], ranks: NDArray[np.int64], rows: int, ranks_per_tile: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Divides runs into tiles of up to `rows` rows and `ranks_per_tile` ranks, with only existing rows and ranks.

    Args:
        segments: int32 [runs, 3]: slot, first row, row after the last.
        ranks: [runs]: the adapters' largest ranks.
        rows: Maximum number of rows per tile.
        ranks_per_tile: Maximum number of ranks per tile.

    Returns:
        int32 [tiles, 4] (slot, first row, row after the last, first rank): tiles that start at rank 0, and the others.
    """
    segments, ranks = segments[ranks > 0], ranks[ranks > 0]
    run, index = _copies(-(-(segments[:, 2] - segments[:, 1]) // rows))
    start = segments[run, 1] + index * rows
    first = np.stack(
        [segments[run, 0], start, np.minimum(start + rows, segments[run, 2]), np.zeros_like(start)], axis=1
    )
    tile, index = _copies(-(-ranks[run] // ranks_per_tile) - 1)
    more = first[tile]
    more[:, 3] = (index + 1) * ranks_per_tile
    return first.astype(np.int32), more.astype(np.int32)


def shrink_and_expand(x: torch.Tensor, y: torch.Tensor, site: ResidentSite, work: StepWork) -> None:
    """A site's work in two launches, with the intermediate h [splits, modules, rows, rank] in device memory."""
    plan, tiles = work.plan, work.tiles
    shrink = plans.shrink(plan, x.itemsize, plans.steps(site.d_in, x.itemsize, plan, len(tiles) * site.modules))
    splits = triton.cdiv(site.d_in, shrink.constants["DEPTH"] * shrink.constants["STEPS"])
    h_row = aligned(4 * work.rank) // 4
    h = torch.empty(splits * site.modules * work.rows * h_row, dtype=torch.float32, device=x.device)
    _launch(
        shrink, (len(tiles), site.modules, splits), site,
        x, site.weights, site.gains, site.table, tiles, h, site.d_in, work.rows, x.stride(0), h_row,
    )  # fmt: skip
    expand = plans.expand(plan)
    _launch(
        expand, (work.count, site.modules, triton.cdiv(site.widest, expand.constants["WIDTH"])), site,
        y, site.weights, site.gains, site.table, site.starts, tiles, h, splits, work.rows, y.stride(0), h_row,
        ALIGN_Y=site.align_y,
    )  # fmt: skip


def fused(x: torch.Tensor, y: torch.Tensor, site: ResidentSite, work: StepWork) -> None:
    """A site's work in one launch, for tiles of one row and ranks up to `plans.FUSED.ranks`."""
    launch = plans.fused(site.d_in, x.itemsize)
    _launch(
        launch, (work.count, site.modules, triton.cdiv(site.widest, launch.constants["WIDTH"])), site,
        x, y, site.weights, site.gains, site.table, site.starts, work.tiles, site.d_in, x.stride(0), y.stride(0),
        ALIGN_Y=site.align_y,
    )  # fmt: skip


def _launch(
    launch: plans.Launch,
    grid: tuple[int, int, int],
    site: ResidentSite,
    *arguments: torch.Tensor | int,
    **constants: int,
) -> None:
    getattr(kernels, launch.kernel)[grid](
        *arguments, MODULES=site.modules, STRIDE=site.table.shape[1], ALIGN=ALIGNMENT // site.weights.itemsize,
        **constants, **launch.constants, **launch.options,
    )  # fmt: skip


_residents: WeakKeyDictionary[Slab, ResidentSlab] = WeakKeyDictionary()


def resident_slab(slab: Slab) -> ResidentSlab:
    """The slab's data as the kernels take it."""
    resident = _residents.get(slab)
    if resident is None:
        resident = _residents[slab] = ResidentSlab(slab)
    return resident


def _site(site: Site, weights: torch.Tensor, gains: torch.Tensor, table: torch.Tensor) -> ResidentSite:
    starts = np.cumsum([0, *site.widths], dtype=np.int32)
    return ResidentSite(
        d_in=site.d_in,
        columns=int(starts[-1]),
        modules=len(site.modules),
        widest=max(site.widths),
        align_y=gcd(16, *site.widths),
        weights=weights,
        gains=gains,
        table=table,
        starts=torch.from_numpy(starts).to(table.device),
    )


def build_work(slab: Slab, batch: Batch) -> StepWork:
    """Divides a batch into tiles and starts to copy them, after the table if that changed."""
    resident = resident_slab(slab)
    resident.refresh(slab)
    segments = batch.segments
    ranks = resident.ranks[segments[:, 0]]
    rank = int(ranks.max(initial=0))
    plan = plans.choose(int((segments[:, 2] - segments[:, 1]).max(initial=0)), rank)
    first, more = tile_list(segments, ranks, plan.rows, plan.shrink.ranks)
    tiles = torch.empty((len(first) + len(more), 4), dtype=torch.int32, device=slab.arena.device)
    copy_to_device(np.concatenate([first, more]), tiles)
    return StepWork(resident, plan, tiles, len(first), batch.rows, rank)


def _copies(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For `counts[i]` copies of each item i: the index of the item, and that of the copy."""
    item = np.repeat(np.arange(len(counts)), counts)
    return item, np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)


def _check(x: torch.Tensor, y: torch.Tensor, site: ResidentSite, work: StepWork, dtype: torch.dtype) -> None:
    for name, tensor, columns in (("x", x, site.d_in), ("y", y, site.columns)):
        fits = tensor.dtype == dtype and tensor.shape == (work.rows, columns)
        if not fits or (columns > 1 and tensor.stride(1) != 1):
            raise EngineFault(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; it must be {dtype} "
                f"{[work.rows, columns]} with contiguous rows."
            )
