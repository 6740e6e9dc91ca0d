"""Carries out what `Residency` decides: versions are fetched, get memory in the slab and are copied there."""

from __future__ import annotations

import time
from collections.abc import Callable

from loramill.errors import EngineFault, LoramillError
from loramill.kernels import Slot
from loramill.kernels.adapters.packing import RANK
from loramill.kernels.peft_folder import BaseModules
from loramill.serve.engine.adapters.host_cache import HostCache
from loramill.serve.engine.adapters.loader import AdapterLoader, FetchedAdapter
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.durations import DurationHistogram
from loramill.serve.engine.types import AdapterSource, EngineConfig
from loramill.serve.model import Model


class AdapterManager:
    """The versions in the slab.

    Attributes:
        slab: The adapters that the model reads.
        loads: Number of versions loaded since the start.
        load_failures: Number of versions that could not be loaded since the start.
        evictions: Number of versions that lost their slots since the start.
    """

    def __init__(
        self,
        model: Model,
        source: AdapterSource,
        config: EngineConfig,
        residency: Residency,
        notify: Callable[[], None],
        load_times: DurationHistogram,
    ) -> None:
        """
        Args:
            model: Makes the slab.
            source: Where versions are.
            config: Sizes and limits.
            residency: Decides which versions have slots.
            notify: Called by another thread when `collect_loaded` has something to collect.
            load_times: Gets the time from the slot to readiness of each version.
        """
        self.slab = model.new_slab(config.adapter_slots, config.adapter_bytes, config.adapter_bits)
        self.loads = self.load_failures = self.evictions = 0
        self._load_times = load_times
        self._residency = residency
        self._slots: dict[str, Slot] = {}
        self._ranks: dict[str, int] = {}
        # By version that is loading: the time at which it got its slot.
        self._started: dict[str, float] = {}
        # Fetched versions that await memory, and the number of steps that the first of them has waited.
        self._awaiting_memory: dict[str, FetchedAdapter] = {}
        self._patience_steps = config.slot_patience_steps
        self._waited_steps = 0
        self._cache = HostCache(config.host_bytes, locked=self.slab.arena.device.type == "cuda")
        base = BaseModules.of_sites(model.sites, model.target_weight, model.merged_norms)
        self._loader = AdapterLoader(self.slab, self._cache, base, source, config.load_threads, notify)

    def wait_until_prepared(self) -> None:
        """Waits until the host cache's memory is ready: page-locking it may stop a GPU for a moment."""
        self._loader.wait_until_prepared()

    @property
    def host_bytes(self) -> int:
        """Bytes of the adapters in the host cache."""
        return self._cache.bytes

    def slot(self, version: str | None) -> Slot | None:
        """The slot of a resident version; None for the base alone."""
        return None if version is None else self._slots[version]

    def rank(self, version: str) -> int:
        """The largest rank in a resident version."""
        return self._ranks[version]

    def collect_loaded(self) -> list[tuple[str, LoramillError]]:
        """Processes what was fetched and copied; returns the versions that can't be loaded, whose slots are freed."""
        failed: list[tuple[str, LoramillError]] = []
        for loaded in self._loader.take_finished():
            version, result = loaded.version, loaded.result
            if isinstance(result, LoramillError):
                self._residency.mark_failed(version)
                self._free(version)
                del self._started[version]
                self.load_failures += 1
                failed.append((version, result))
            elif isinstance(result, Slot):
                self._residency.mark_loaded(version)
                self.loads += 1
                self._load_times.observe(time.monotonic() - self._started.pop(version))
            else:
                self._awaiting_memory[version] = result
        self._allocate_awaiting()
        return failed

    def _allocate_awaiting(self) -> None:
        """Finds memory for fetched versions, for a while also for smaller ones ahead of larger ones."""
        first = next(iter(self._awaiting_memory), None)
        for version, fetched in list(self._awaiting_memory.items()):
            if version != first and self._waited_steps > self._patience_steps:
                break
            slot = self._allocate(fetched.adapter.bytes)
            if slot is not None:
                del self._awaiting_memory[version]
                self._slots[version] = slot
                self._ranks[version] = int(fetched.adapter.table[..., RANK].max())
                self._loader.copy(version, fetched, slot)
            elif not self._residency.has_users(version):
                del self._awaiting_memory[version], self._started[version]
                self._residency.mark_failed(version)
                self._loader.release(version, fetched)
        self._waited_steps = self._waited_steps + 1 if first in self._awaiting_memory else 0

    def advance(self) -> None:
        """Hands out slots and starts to fetch; called once per step, after failed versions' requests have ended."""
        changes = self._residency.advance(awaiting_memory=len(self._awaiting_memory))
        for version in changes.evict:
            self._free(version)
        self.evictions += len(changes.evict)
        for version in changes.load:
            self._started[version] = time.monotonic()
            self._loader.fetch(version)

    def check_integrity(self) -> None:
        """Compares the slots with the slab and the residency.

        Raises:
            EngineFault: They differ.
        """
        self.slab.check_integrity()
        resident, loading = set(self._residency.resident), set(self._residency.loading)
        copying = self._slots.keys() - resident
        if not resident <= self._slots.keys() or not copying <= loading:
            raise EngineFault(
                f"Versions {sorted(resident)} are resident and {sorted(loading)} loading; slots are held by "
                f"{sorted(self._slots)}."
            )
        if self.slab.free_slots != self._residency.slots - len(self._slots) or self._ranks.keys() != self._slots.keys():
            raise EngineFault(f"{len(self._slots)} versions hold slots; the slab has {self.slab.free_slots} free.")
        if not set(self._awaiting_memory) <= loading - copying:
            raise EngineFault(f"Versions {sorted(self._awaiting_memory)} await memory; {sorted(loading)} are loading.")

    def close(self, *, wait: bool = True) -> None:
        """Ends the loader's threads; with `wait`, after the fetches that have begun."""
        self._loader.close(wait=wait)

    def _allocate(self, size: int) -> Slot | None:
        slot = self.slab.allocate(size)
        if slot is None:
            idle = {version: self._slots[version] for version in self._residency.idle}
            freed = self.slab.evict(size, tuple(idle.values())) or ()
            for version in [version for version, slot in idle.items() if slot in freed]:
                del self._slots[version], self._ranks[version]
                self._residency.evict(version)
                self.evictions += 1
            slot = self.slab.allocate(size)
        return slot

    def _free(self, version: str) -> None:
        slot = self._slots.pop(version, None)
        if slot is not None:
            self.slab.free(slot)
            del self._ranks[version]
