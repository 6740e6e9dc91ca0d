"""Which adapters are in the slots: pure Python over versions and counts.

A version is fetched only once it has a slot, is pinned while requests run with it, and stays afterwards until the slot
is wanted. If every slot is in use, versions wait in the order they came; one that has waited too long makes the least
recently used version drain: it gets no new requests until its slot has changed hands.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramill.errors import EngineFault


@dataclass(slots=True)
class _Entry:
    users: int = 0
    pins: int = 0
    slotted: bool = False
    ready: bool = False
    draining: bool = False
    used: int = 0
    waiting_since: int = 0


@dataclass(frozen=True, slots=True)
class SlotChanges:
    """Versions that leave their slots, then versions that get one and must be fetched."""

    evict: tuple[str, ...]
    load: tuple[str, ...]


class Residency:
    """The versions that live requests want, and those that linger in slots."""

    def __init__(self, slots: int, patience_steps: int) -> None:
        self._slots = slots
        self._patience = patience_steps
        self._clock = 0
        self._entries: dict[str, _Entry] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        """Versions that requests can run with, or could if they weren't draining."""
        return tuple(version for version, entry in self._entries.items() if entry.ready)

    @property
    def loading(self) -> tuple[str, ...]:
        """Versions with a slot that are still being fetched."""
        return tuple(version for version, entry in self._entries.items() if entry.slotted and not entry.ready)

    def ready(self, version: str) -> bool:
        """Whether a request may begin to run with a version now."""
        entry = self._entries[version]
        return entry.ready and not entry.draining

    def acquire(self, version: str) -> None:
        """One more live request."""
        entry = self._entries.setdefault(version, _Entry(waiting_since=self._clock))
        entry.users += 1

    def release(self, version: str) -> None:
        """One live request less."""
        entry = self._entries[version]
        entry.users -= 1
        if not entry.users and not entry.slotted:
            del self._entries[version]

    def has_users(self, version: str) -> bool:
        """Whether a live request asks for a version."""
        return version in self._entries and self._entries[version].users > 0

    def begin_use(self, version: str) -> None:
        """A request began to run."""
        entry = self._entries[version]
        entry.pins += 1
        entry.used = self._clock

    def end_use(self, version: str) -> None:
        """A request runs no more."""
        self._entries[version].pins -= 1

    def mark_loaded(self, version: str) -> None:
        """A fetch has succeeded."""
        entry = self._entries[version]
        entry.ready, entry.used = True, self._clock

    def mark_failed(self, version: str) -> None:
        """A fetch has failed, and its requests have been told, or nobody wants it: the next request tries again."""
        entry = self._entries[version]
        entry.slotted = False
        if not entry.users:
            del self._entries[version]

    @property
    def idle(self) -> tuple[str, ...]:
        """Versions that may leave their slots now, the best to lose first."""
        idle = [
            (not entry.draining, entry.used, version)
            for version, entry in self._entries.items()
            if entry.ready and not entry.pins and (entry.draining or not entry.users)
        ]
        return tuple(version for _, _, version in sorted(idle))

    def evict(self, version: str) -> None:
        """An idle version has lost its slot; if it is wanted, it waits for another."""
        entry = self._entries[version]
        if not entry.users:
            del self._entries[version]
            return
        entry.slotted = entry.ready = entry.draining = False
        entry.waiting_since = self._clock

    def advance(self, awaiting_memory: int = 0) -> SlotChanges:
        """Hands out slots; called once a step.

        Args:
            crowded: versions that have a slot and are fetched, but find no memory: as many others begin to drain.
        """
        self._clock += 1
        evict: list[str] = []
        load: list[str] = []
        queue = sorted((e.waiting_since, v) for v, e in self._entries.items() if e.users and not e.slotted)
        free = self._slots - sum(entry.slotted for entry in self._entries.values())
        for _, version in queue:
            if free:
                free -= 1
            else:
                if not self.idle:
                    break
                evict.append(self.idle[0])
                self.evict(evict[-1])
            self._entries[version].slotted = True
            load.append(version)
        self._drain(awaiting_memory + sum(self._clock - since > self._patience for since, _ in queue[len(load) :]))
        return SlotChanges(tuple(evict), tuple(load))

    def check_integrity(self, users: dict[str, int], in_use: dict[str, int]) -> None:
        """Compares the books with what the engine counts of live and running requests.

        Raises:
            EngineFault: they differ, or more slots are given than there are.
        """
        mine = {version: entry.users for version, entry in self._entries.items() if entry.users}
        if mine != users:
            raise EngineFault(f"Versions are wanted {users} times; residency has {mine}.")
        pinned = {version: entry.pins for version, entry in self._entries.items() if entry.pins}
        if pinned != in_use:
            raise EngineFault(f"Versions are in use {in_use} times; residency has {pinned}.")
        slotted = sum(entry.slotted for entry in self._entries.values())
        if slotted > self._slots or any(e.pins and not e.ready for e in self._entries.values()):
            raise EngineFault(f"{slotted} of {self._slots} slots are given, or one is in use before it is loaded.")

    def _drain(self, wanted: int) -> None:
        # Those that drain already come first, and stop draining once nobody waits for them. A version that is ready
        # but not in use has yet to get its turn.
        ready = [(version, entry) for version, entry in self._entries.items() if entry.ready]
        for _, entry in ready:
            # What it leaves wasn't enough, or it would be gone: it stays free for who waits, and another drains, too.
            if not entry.pins:
                entry.draining &= wanted > 0
        in_use = sorted((not entry.draining, entry.used, version) for version, entry in ready if entry.pins)
        for index, (_, _, version) in enumerate(in_use):
            self._entries[version].draining = index < wanted
