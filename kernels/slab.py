"""The arena that resident adapters live in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels.adapter import (
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
    """One slot's part of the arena; `loaded` once its weights are all there."""

    generation: int = 0
    offset: int = 0
    size: int = 0
    taken: bool = False
    loaded: bool = False


class Slab:
    """Adapters of any ranks and targets in one arena of bytes, each behind a numbered slot.

    One thread allocates, frees and runs kernels. Any thread may pack, and may load a slot that was allocated for it:
    nothing reads the slot before `load` returns.

    Attributes:
        sites: where the adapters act.
        dtype: of their matrices; float32, bfloat16 or float16 as x, or int8.
        layout: how these lie; the backend's.
        arena: uint8 [size], on the device.
        arena_address: of the arena's first byte.
        table: int64 [sites, slots, modules of the widest site, 4], on the host: bytes from the arena's start to a, b
            and gain (-1: none), and the rank (0: no target).
        changes: another number each time a slot is loaded or freed; what was worked out for another is out of date.
        views: the slab at each site, what `lora` takes.
    """

    def __init__(
        self, sites: Sequence[Site], *, slots: int, size: int, dtype: torch.dtype, layout: Layout, device: str = "cpu"
    ) -> None:
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
        self.views = tuple(SiteSlab(self, index) for index in range(len(self.sites)))

    @property
    def bytes(self) -> int:
        """Bytes of the adapters in all slots."""
        return sum(place.size for place in self._allocations)

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return self._extents.size

    @property
    def free_bytes(self) -> int:
        """Bytes of the arena that no slot has."""
        return self._extents.free_bytes

    @property
    def free_slots(self) -> int:
        """Slots that nobody has."""
        return sum(not place.taken for place in self._allocations)

    def pack(self, deltas: Mapping[str, Delta], allocate: Allocator = host_memory) -> PackedAdapter:
        """Lays an adapter out for `load`, in bytes that come from `memory`; any thread may do it.

        Raises:
            AdapterInvalid: a delta names no module of the base, or its shapes don't fit.
        """
        return pack(self.sites, deltas, self.layout, self.dtype, allocate)

    def allocate(self, size: int) -> Slot | None:
        """Takes a slot with room for `size` bytes; None: all slots are taken, or no free part is large enough."""
        index = next((i for i, place in enumerate(self._allocations) if not place.taken), None)
        offset = None if index is None else self._extents.allocate(size)
        if index is None or offset is None:
            return None
        place = self._allocations[index]
        place.offset, place.size, place.taken, place.loaded = offset, size, True, False
        return Slot(index, place.generation)

    def load(self, slot: Slot, adapter: PackedAdapter) -> None:
        """Copies an adapter into a slot that was allocated for its bytes.

        Raises:
            EngineFault: the handle is stale, the slot is loaded already or was allocated for another size, or the
                adapter was packed for other sites.
        """
        place = self._allocation(slot)
        if place.loaded or adapter.bytes != place.size:
            raise EngineFault(
                f"Slot {slot.index} is loaded, or was allocated for {place.size} bytes and no other size."
            )
        if adapter.table.shape != self.table[:, slot.index].shape:
            raise EngineFault(f"An adapter of {len(adapter.table)} sites doesn't fit a slab of {len(self.sites)}.")
        self.arena[place.offset : place.offset + place.size].copy_(adapter.data)
        table = adapter.table.copy()
        table[..., [A, B]] += place.offset
        table[..., GAIN] += np.where(table[..., GAIN] < 0, 0, place.offset)
        self.table[:, slot.index] = table
        self.changes = next(self._ticks)
        place.loaded = True

    def prepare(self, size: int) -> None:
        """Has pages ready for the next `size` bytes of adapters, as far as the arena goes; any thread may do it."""
        end = max(place.offset + place.size for place in self._allocations) if self._allocations else 0
        if self.arena.device.type == "cpu":
            populate(self.arena[end : end + size])

    def free(self, slot: Slot) -> None:
        """Empties a slot and makes every handle to it stale.

        Raises:
            EngineFault: the handle is stale already.
        """
        place = self._allocation(slot)
        self._extents.release(place.offset, place.size)
        self.table[:, slot.index] = 0
        self._allocations[slot.index] = _Allocation(generation=place.generation + 1)
        self.changes = next(self._ticks)

    def evict(self, size: int, idle: Sequence[Slot]) -> list[Slot] | None:
        """Frees slots, in the order of `idle`, until `allocate(size)` would succeed.

        Returns:
            The slots that were freed; None, and nothing is freed, if all of them together wouldn't make the room.

        Raises:
            EngineFault: a handle is stale.
        """
        trial = self._extents.copy()
        slots = self.free_slots
        for count, slot in enumerate([None, *idle]):
            if slot is not None:
                place = self._allocation(slot)
                trial.release(place.offset, place.size)
                slots += 1
            if slots and trial.fits(size):
                for freed in idle[:count]:
                    self.free(freed)
                return list(idle[:count])
        return None

    def check(self, batch: Batch) -> None:
        """Makes sure that a batch's handles are good; costs next to nothing until a slot changes.

        Raises:
            EngineFault: a run's slot was freed since, or nothing was loaded into it.
        """
        if batch.memo.get(self) == self.changes:
            return
        changes = self.changes
        for run in batch.runs:
            if not self._allocation(run.slot).loaded:
                raise EngineFault(f"Slot {run.slot.index} is used before an adapter was loaded into it.")
        batch.memo[self] = changes

    def check_integrity(self) -> None:
        """Compares the books.

        Raises:
            EngineFault: parts of the arena overlap or are lost, or a table points out of its slot's part.
        """
        faults = self._extents.faults([(place.offset, place.size) for place in self._allocations if place.taken])
        for index, place in enumerate(self._allocations):
            table = self.table[:, index]
            used = table[table[..., RANK] > 0]
            # One that is taken may be on its way: the table is written before the place counts as loaded.
            if used.size and not place.taken:
                faults.append(f"slot {index} has targets and no owner")
            offsets = used[:, [A, B, GAIN]]
            inside = (offsets >= place.offset) & (offsets < place.offset + max(place.size, 1))
            if not (inside | (offsets == -1)).all():
                faults.append(f"slot {index} points out of its part of the arena")
        if faults:
            raise EngineFault(f"The slab's books don't add up: {'; '.join(faults)}.")

    def _allocation(self, slot: Slot) -> _Allocation:
        place = self._allocations[slot.index]
        if place.generation != slot.generation or not place.taken:
            raise EngineFault(
                f"Slot {slot.index} is of generation {place.generation}, the handle of {slot.generation}: "
                "it was freed meanwhile."
            )
        return place


class SiteSlab:
    """One site of a slab.

    Attributes:
        slab: the whole.
        site: where.
        index: of the site.
        table: int64 [slots, modules, 4], as the slab's.
        columns: of y.
        table_address, widths_address: of the table, and of the site's widths as int64, for kernels in C.
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
        """A module's matrices as they lie in a slab of layout ROWS, int8 ones as floats again; None: no target."""
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
        """A view of the arena from byte `offset` on."""
        size = int(np.prod(shape)) * dtype.itemsize
        return self.slab.arena[offset : offset + size].view(dtype).view(shape)
