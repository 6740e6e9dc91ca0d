"""The memory arena of resident adapters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels.adapters.copy_stream import CopyStream, Mark, new_copy_stream
from loramill.kernels.adapters.packing import (
    GAIN,
    RANK,
    A,
    B,
    Delta,
    Layout,
    PackedAdapter,
    Site,
    modules_per_site,
    pack,
    scales_offset,
)
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.memory import Allocator, Extents, host_memory, populate


@dataclass(slots=True)
class _Allocation:
    """One slot's part of the arena.

    Attributes:
        taken: Whether it was allocated.
        loaded: Whether all of its weights are copied.
        unread: The point of the device's computation after which no kernel reads the earlier content of these bytes.
    """

    generation: int = 0
    offset: int = 0
    size: int = 0
    taken: bool = False
    loaded: bool = False
    unread: Mark = None


class Slab:
    """Adapters of any ranks and targets in one arena of bytes, each in a numbered slot.

    One thread allocates, frees and runs kernels. Any thread may pack, and may load a slot that was allocated for it:
    nothing reads the slot before `load` returns. A slot may be freed while kernels that read it are in flight on a GPU:
    the next load into its bytes waits for them, and nothing else does.

    Attributes:
        sites: Where adapters apply.
        dtype: Dtype of their matrices: float32, bfloat16 or float16, as x, or int8.
        layout: The backend's layout of these matrices.
        arena: uint8 [size], on the device.
        arena_address: Address of the arena's first byte.
        table: int64 [sites, slots, modules of the widest site, 4], on the host: offsets in bytes from the arena's start
            of a, b and gain (-1: none), and the rank (0: not a target).
        changes: A number that changes each time a slot is loaded or freed, for invalidating cached values.
        views: The slab at each site, as `lora` takes it.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        slots: int,
        size: int,
        dtype: torch.dtype,
        layout: Layout,
        device: str = "cpu",
        copies: CopyStream | None = None,
    ) -> None:
        """
        Args:
            sites, dtype, layout: See the attributes.
            slots: Number of slots.
            size: Bytes of the arena.
            device: The device of the arena.
            copies: The copies to the device; None: those of `new_copy_stream`.
        """
        self.sites = tuple(sites)
        self.dtype = dtype
        self.layout = layout
        self.arena = host_memory(size) if device == "cpu" else torch.zeros(size, dtype=torch.uint8, device=device)
        self.arena_address = self.arena.data_ptr()
        self.table = np.zeros((len(self.sites), slots, modules_per_site(self.sites), 4), dtype=np.int64)
        self._ticks = itertools.count(1)
        self.changes = 0
        self._allocations = [_Allocation() for _ in range(slots)]
        self._extents = Extents(size)
        self._copies = new_copy_stream(self.arena.device) if copies is None else copies
        # The kernel that fills the arena with zeros may be in flight. One thread launches kernels, in one order: the
        # last mark covers all before it.
        self._unread = self._copies.mark()
        self.views: tuple[SiteSlab, ...] = tuple(SiteSlab(self, index) for index in range(len(self.sites)))

    @property
    def bytes(self) -> int:
        """Bytes of the adapters in all slots."""
        return sum(allocation.size for allocation in self._allocations)

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return self._extents.size

    @property
    def free_bytes(self) -> int:
        """Bytes of the arena that no slot holds."""
        return self._extents.free_bytes

    @property
    def free_slots(self) -> int:
        """Number of slots that are not taken."""
        return sum(not allocation.taken for allocation in self._allocations)

    def pack(self, deltas: Mapping[str, Delta], allocate: Allocator = host_memory) -> PackedAdapter:
        """Converts an adapter to the form that `load` takes, in memory from `allocate`; any thread may call it.

        Raises:
            AdapterInvalid: A delta's module is not in the base, or its shapes do not match.
        """
        return pack(self.sites, deltas, self.layout, self.dtype, allocate)

    def allocate(self, size: int) -> Slot | None:
        """Takes a slot of `size` bytes; returns None if all slots are taken or no free part is large enough."""
        index = next((i for i, allocation in enumerate(self._allocations) if not allocation.taken), None)
        offset = None if index is None else self._extents.allocate(size)
        if index is None or offset is None:
            return None
        allocation = self._allocations[index]
        self._allocations[index] = _Allocation(allocation.generation, offset, size, taken=True, unread=self._unread)
        return Slot(index, allocation.generation)

    def load(self, slot: Slot, adapter: PackedAdapter) -> None:
        """Copies an adapter into a slot that was allocated for its bytes; returns once it is there.

        Raises:
            EngineFault: The handle is stale, the slot is already loaded or was allocated for another size, or the
                adapter was packed for other sites.
        """
        allocation = self._allocation(slot)
        if allocation.loaded or adapter.bytes != allocation.size:
            raise EngineFault(
                f"Slot {slot.index} is loaded, or was allocated for {allocation.size} bytes, not {adapter.bytes}."
            )
        if adapter.table.shape != self.table[:, slot.index].shape:
            raise EngineFault(f"An adapter of {len(adapter.table)} sites doesn't fit a slab of {len(self.sites)}.")
        target = self.arena[allocation.offset : allocation.offset + allocation.size]
        self._copies.copy(adapter.data, target, allocation.unread)
        table = adapter.table.copy()
        table[..., [A, B]] += allocation.offset
        table[..., GAIN] += np.where(table[..., GAIN] < 0, 0, allocation.offset)
        self.table[:, slot.index] = table
        self.changes = next(self._ticks)
        allocation.loaded = True

    def close(self) -> None:
        """Drops the views, which refer to the slab: its memory is freed once no one else uses it.

        Only the thread that runs kernels may call it. A load that is under way ends as usual.
        """
        self.views = ()

    def prepare(self, size: int) -> None:
        """Populates the pages of the next `size` bytes of the arena, up to its end; any thread may call it."""
        end = max(allocation.offset + allocation.size for allocation in self._allocations) if self._allocations else 0
        if self.arena.device.type == "cpu":
            populate(self.arena[end : end + size])

    def free(self, slot: Slot) -> None:
        """Empties a slot and makes every handle to it stale; kernels that were launched before may still read it.

        Raises:
            EngineFault: The handle is already stale.
        """
        allocation = self._allocation(slot)
        self._unread = self._copies.mark()
        self._extents.release(allocation.offset, allocation.size)
        self.table[:, slot.index] = 0
        self._allocations[slot.index] = _Allocation(generation=allocation.generation + 1)
        self.changes = next(self._ticks)

    def evict(self, size: int, idle: Sequence[Slot]) -> list[Slot] | None:
        """Frees slots, in the order of `idle`, until `allocate(size)` would succeed.

        Returns:
            The slots that were freed; None, and nothing is freed, if not even all of them would make enough room.

        Raises:
            EngineFault: A handle is stale.
        """
        trial = self._extents.copy()
        slots = self.free_slots
        for count, slot in enumerate([None, *idle]):
            if slot is not None:
                allocation = self._allocation(slot)
                trial.release(allocation.offset, allocation.size)
                slots += 1
            if slots and trial.fits(size):
                for freed in idle[:count]:
                    self.free(freed)
                return list(idle[:count])
        return None

    def check(self, batch: Batch) -> None:
        """Checks a batch's handles; costs next to nothing until a slot changes.

        Raises:
            EngineFault: A run's slot has been freed, or nothing was loaded into it.
        """
        if batch.memo.get(self) == self.changes:
            return
        changes = self.changes
        for run in batch.runs:
            if not self._allocation(run.slot).loaded:
                raise EngineFault(f"Slot {run.slot.index} is used before an adapter was loaded into it.")
        batch.memo[self] = changes

    def check_integrity(self) -> None:
        """Checks allocations and tables against each other.

        Raises:
            EngineFault: Parts of the arena overlap or are lost, or a table points outside of its slot's part.
        """
        faults = self._extents.faults(
            [(allocation.offset, allocation.size) for allocation in self._allocations if allocation.taken]
        )
        for index, allocation in enumerate(self._allocations):
            table = self.table[:, index]
            used = table[table[..., RANK] > 0]
            # A taken slot may be loading: its table is written before it counts as loaded.
            if used.size and not allocation.taken:
                faults.append(f"slot {index} has targets and no owner")
            offsets = used[:, [A, B, GAIN]]
            inside = (offsets >= allocation.offset) & (offsets < allocation.offset + max(allocation.size, 1))
            if not (inside | (offsets == -1)).all():
                faults.append(f"slot {index} points outside of its part of the arena")
        if faults:
            raise EngineFault(f"Slab invariant violated: {'; '.join(faults)}.")

    def _allocation(self, slot: Slot) -> _Allocation:
        allocation = self._allocations[slot.index]
        if allocation.generation != slot.generation or not allocation.taken:
            raise EngineFault(
                f"Slot {slot.index} has generation {allocation.generation}, the handle {slot.generation}: the slot was "
                "freed meanwhile."
            )
        return allocation


class SiteSlab:
    """One site of a slab.

    Attributes:
        slab: The whole slab.
        site: The site.
        index: Index of the site.
        table: int64 [slots, modules, 4], a part of the slab's table.
        columns: Number of columns of y.
        table_address: Address of the table, for kernels in C.
        widths_address: Address of the site's widths as int64, likewise.
    """

    __slots__ = ("_widths", "columns", "index", "site", "slab", "table", "table_address", "widths_address")

    def __init__(self, slab: Slab, index: int) -> None:
        self.slab = slab
        self.site = slab.sites[index]
        self.index = index
        self.table: NDArray[np.int64] = slab.table[index]
        self.columns = sum(self.site.widths)
        self._widths = np.array(self.site.widths, dtype=np.int64)
        self.table_address = self.table.ctypes.data
        self.widths_address = self._widths.ctypes.data

    def delta(self, slot: int, module: int) -> Delta | None:
        """A module's matrices in a slab of layout ROWS, with int8 dequantized; None if it is not a target."""
        a, b, gain, rank = self.table[slot, module].tolist()
        if not rank:
            return None
        width = self.site.widths[module]
        matrix_a = self.tensor(a, (rank, self.site.d_in), self.slab.dtype)
        matrix_b = self.tensor(b, (width, rank), self.slab.dtype)
        if self.slab.dtype == torch.int8:
            matrix_a = matrix_a * self.tensor(scales_offset(a, rank), (rank, 1), torch.float32)
        return Delta(matrix_a, matrix_b, None if gain < 0 else self.tensor(gain, (width,), torch.float32))

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view of the arena that starts at byte `offset`."""
        size = int(np.prod(shape)) * dtype.itemsize
        return self.slab.arena[offset : offset + size].view(dtype).view(shape)
