"""The engine's adapters: residency decides, the loader fetches and copies, the slab holds."""

from __future__ import annotations

import time
from collections.abc import Callable

from loramill.errors import EngineFault, LoramillError
from loramill.kernels import Slot
from loramill.kernels.adapter import RANK
from loramill.kernels.peft_folder import BaseModules
from loramill.serve.engine.adapters.host_cache import HostCache
from loramill.serve.engine.adapters.loader import AdapterLoader, Fetched
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.durations import DurationHistogram
from loramill.serve.engine.types import AdapterSource, EngineConfig
from loramill.serve.model import Model


class AdapterManager:
    """Versions and their slots. A version of None is the base alone: always ready, and it holds nothing.

    Attributes:
        slab: what the decoder reads.
        loads, failures, evictions: of versions, since the start.
    """

    def __init__(
        self,
        model: Model,
        source: AdapterSource,
        config: EngineConfig,
        notify: Callable[[], None],
        load_times: DurationHistogram,
    ) -> None:
        self.slab = model.new_slab(config.adapter_slots, config.adapter_bytes, config.adapter_bits)
        self.loads = self.load_failures = self.evictions = 0
        self._load_times = load_times
        self._capacity = config.adapter_slots
        self._residency = Residency(config.adapter_slots, config.slot_patience_steps)
        self._slots: dict[str, Slot] = {}
        self._ranks: dict[str, int] = {}
        # When those that are loading got their slots.
        self._begun: dict[str, float] = {}
        # Those waiting for room, and how many steps the first of them has.
        self._arrived: dict[str, Fetched] = {}
        self._patience = config.slot_patience_steps
        self._waited = 0
        self._cache = HostCache(config.host_bytes)
        base = BaseModules.of_sites(model.sites, model.target_weight)
        self._loader = AdapterLoader(self.slab, self._cache, base, source, config.load_threads, notify)

    @property
    def host_bytes(self) -> int:
        """Of the adapters in the host cache."""
        return self._cache.bytes

    @property
    def resident(self) -> tuple[str, ...]:
        """Versions in slots, loaded."""
        return self._residency.resident

    @property
    def loading(self) -> tuple[str, ...]:
        """Versions with a slot that are being fetched."""
        return self._residency.loading

    def ready(self, version: str | None) -> bool:
        """Whether a request may begin to run."""
        return version is None or self._residency.ready(version)

    def slot(self, version: str | None) -> Slot | None:
        """Where a resident version is."""
        return None if version is None else self._slots[version]

    def rank(self, version: str) -> int:
        """The largest rank in a resident version."""
        return self._ranks[version]

    def acquire(self, version: str | None) -> None:
        """One more live request."""
        if version is not None:
            self._residency.acquire(version)

    def release(self, version: str | None) -> None:
        """One live request less."""
        if version is not None:
            self._residency.release(version)

    def begin_use(self, version: str | None) -> None:
        """A request began to run."""
        if version is not None:
            self._residency.begin_use(version)

    def end_use(self, version: str | None) -> None:
        """A request runs no more."""
        if version is not None:
            self._residency.end_use(version)

    def collect_loaded(self) -> list[tuple[str, LoramillError]]:
        """Takes in what was fetched and copied; returns the versions that can't be had, whose slots are given back."""
        failed: list[tuple[str, LoramillError]] = []
        for loaded in self._loader.take_finished():
            version, result = loaded.version, loaded.result
            if isinstance(result, LoramillError):
                self._residency.mark_failed(version)
                self._give_back(version)
                del self._begun[version]
                self.load_failures += 1
                failed.append((version, result))
            elif isinstance(result, Slot):
                self._residency.mark_loaded(version)
                self.loads += 1
                self._load_times.observe(time.monotonic() - self._begun.pop(version))
            else:
                self._arrived[version] = result
        self._settle()
        return failed

    def _settle(self) -> None:
        """Finds room for those that wait for it, smaller ones before larger ones for a while."""
        first = next(iter(self._arrived), None)
        for version, fetched in list(self._arrived.items()):
            if version != first and self._waited > self._patience:
                break
            slot = self._room(fetched.adapter.bytes)
            if slot is not None:
                del self._arrived[version]
                self._slots[version] = slot
                self._ranks[version] = int(fetched.adapter.table[..., RANK].max())
                self._loader.copy(version, fetched, slot)
            elif not self._residency.has_users(version):
                del self._arrived[version], self._begun[version]
                self._residency.mark_failed(version)
                self._loader.release(version, fetched)
        self._waited = self._waited + 1 if first in self._arrived else 0

    def advance(self) -> None:
        """Hands out slots and begins to fetch; called once a step, when the requests of failed versions are gone."""
        moves = self._residency.advance(awaiting_memory=len(self._arrived))
        for version in moves.evict:
            self._give_back(version)
        self.evictions += len(moves.evict)
        for version in moves.load:
            self._begun[version] = time.monotonic()
            self._loader.fetch(version)

    def _give_back(self, version: str) -> None:
        slot = self._slots.pop(version, None)
        if slot is not None:
            self.slab.free(slot)
            del self._ranks[version]

    def _room(self, size: int) -> Slot | None:
        slot = self.slab.allocate(size)
        if slot is None:
            idle = {version: self._slots[version] for version in self._residency.idle}
            freed = self.slab.evict(size, tuple(idle.values())) or ()
            for version in [version for version, its in idle.items() if its in freed]:
                del self._slots[version], self._ranks[version]
                self._residency.evict(version)
                self.evictions += 1
            slot = self.slab.allocate(size)
        return slot

    def check_integrity(self, users: dict[str, int], pins: dict[str, int]) -> None:
        """Compares the books with what the engine counts of live and running requests by version.

        Raises:
            EngineFault: they don't add up.
        """
        self._residency.check_integrity(users, pins)
        self.slab.check_integrity()
        coming = self._slots.keys() - set(self.resident)
        if not set(self.resident) <= self._slots.keys() or not coming <= set(self.loading):
            raise EngineFault(
                f"Versions {sorted(self.resident)} are resident and {sorted(self.loading)} loading; slots are held by "
                f"{sorted(self._slots)}."
            )
        if self.slab.free_slots != self._capacity - len(self._slots) or self._ranks.keys() != self._slots.keys():
            raise EngineFault(f"{len(self._slots)} versions hold slots; the slab has {self.slab.free_slots} free.")
        if not set(self._arrived) <= set(self.loading) - coming:
            raise EngineFault(f"Versions {sorted(self._arrived)} wait for room; {sorted(self.loading)} are loading.")

    def close(self, *, wait: bool = True) -> None:
        """Ends the side threads, after the fetches that have begun."""
        self._loader.close(wait=wait)
