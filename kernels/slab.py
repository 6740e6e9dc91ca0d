"""The slots that adapters live in."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.errors import EngineFault
from loramill.kernels.adapter import PackedAdapter, PackedSite, Site
from loramill.kernels.batch import Slot


class Slab:
    """A fixed number of slots, each empty or holding one adapter of any ranks and targets.

    One thread allocates, loads and frees; loading is taking over an adapter that `pack` has laid out.
    """

    def __init__(self, sites: Sequence[Site], slots: int) -> None:
        self._sites = tuple(sites)
        self._generations = [0] * slots
        self._adapters: list[PackedAdapter | None] = [None] * slots
        self._bytes = [0] * slots
        self._free = list(reversed(range(slots)))
        self.views = tuple(SiteSlab(self, index) for index in range(len(self._sites)))

    @property
    def bytes(self) -> int:
        """Bytes of weights in all slots."""
        return sum(self._bytes)

    @property
    def free_slots(self) -> int:
        """Slots that `allocate` can still give."""
        return len(self._free)

    def allocate(self) -> Slot:
        """Takes an empty slot.

        Raises:
            EngineFault: all are taken.
        """
        if not self._free:
            raise EngineFault("The slab has no free slot; free one first.")
        index = self._free.pop()
        return Slot(index, self._generations[index])

    def load(self, slot: Slot, adapter: PackedAdapter) -> None:
        """Puts an adapter, packed for the same sites, into an allocated slot.

        Raises:
            EngineFault: the handle is stale, or the adapter was packed for other sites.
        """
        self._check(slot)
        if len(adapter) != len(self._sites):
            raise EngineFault(f"An adapter of {len(adapter)} sites doesn't fit a slab of {len(self._sites)}.")
        self._adapters[slot.index] = adapter
        self._bytes[slot.index] = sum(site.bytes for site in adapter if site)

    def free(self, slot: Slot) -> None:
        """Empties a slot and makes every handle to it stale.

        Raises:
            EngineFault: the handle is stale already.
        """
        self._check(slot)
        self._adapters[slot.index] = None
        self._bytes[slot.index] = 0
        self._generations[slot.index] += 1
        self._free.append(slot.index)

    def adapter(self, slot: Slot) -> PackedAdapter:
        """What a slot holds.

        Raises:
            EngineFault: the handle is stale, or nothing was loaded.
        """
        self._check(slot)
        adapter = self._adapters[slot.index]
        if adapter is None:
            raise EngineFault(f"Slot {slot.index} is used before an adapter was loaded into it.")
        return adapter

    def check_integrity(self) -> None:
        """Compares the books.

        Raises:
            EngineFault: a slot is free twice, or free and full.
        """
        if len(set(self._free)) != len(self._free):
            raise EngineFault(f"Slots are free twice: {sorted(self._free)}.")
        full = [index for index in self._free if self._adapters[index] is not None or self._bytes[index]]
        if full:
            raise EngineFault(f"Free slots hold adapters: {full}.")

    def _check(self, slot: Slot) -> None:
        if self._generations[slot.index] != slot.generation:
            raise EngineFault(
                f"Slot {slot.index} is of generation {self._generations[slot.index]}, the handle of {slot.generation}: "
                "it was freed meanwhile."
            )


class SiteSlab:
    """One site of a slab: what `lora` works on."""

    __slots__ = ("_index", "_slab")

    def __init__(self, slab: Slab, index: int) -> None:
        self._slab = slab
        self._index = index

    def weights(self, slot: Slot) -> PackedSite | None:
        """The weights that a slot's adapter has here; None: no target.

        Raises:
            EngineFault: the handle is stale, or nothing was loaded.
        """
        return self._slab.adapter(slot)[self._index]
