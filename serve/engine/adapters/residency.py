"""Decides which adapters are in the slots: pure Python over versions and counts.

A version is fetched only once it has a slot. It stays there while requests run with it, and afterwards until the slot
is needed. When every slot is in use, versions wait in the order of their arrival; when one has waited too long, the
least recently used version drains: it gets no new requests until its slot has changed hands.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramill.errors import EngineFault


@dataclass(slots=True)
class _Entry:
    """A version with live requests, a slot, or both.

    Attributes:
        users: Number of live requests.
        in_use: Number of running requests.
        has_slot: Whether it has a slot.
        ready: Whether it is loaded into its slot.
        draining: Whether it gets no new running requests.
        last_used: The step of its last use.
        waiting_since: The step since which it waits for a slot.
    """

    users: int = 0
    in_use: int = 0
    has_slot: bool = False
    ready: bool = False
    draining: bool = False
    last_used: int = 0
    waiting_since: int = 0


@dataclass(frozen=True, slots=True)
class SlotChanges:
    """Versions that lose their slots, then versions that get one and must be fetched."""

    evict: tuple[str, ...]
    load: tuple[str, ...]


class Residency:
    """The versions that live requests use, and those that remain in slots.

    A version of None is the base alone: it is always ready and needs no slot.

    Attributes:
        slots: Number of slots.
    """

    def __init__(self, slots: int, patience_steps: int) -> None:
        """
        Args:
            slots: Number of slots.
            patience_steps: Steps that a version waits for a slot before another version drains.
        """
        self.slots = slots
        self._patience_steps = patience_steps
        self._clock = 0
        self._entries: dict[str, _Entry] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        """Versions that are loaded into slots, draining ones included."""
        return tuple(version for version, entry in self._entries.items() if entry.ready)

    @property
    def loading(self) -> tuple[str, ...]:
        """Versions with a slot that are still being fetched."""
        return tuple(version for version, entry in self._entries.items() if entry.has_slot and not entry.ready)

    def ready(self, version: str | None) -> bool:
        """Whether a request may start to run with a version now."""
        if version is None:
            return True
        entry = self._entries[version]
        return entry.ready and not entry.draining

    def acquire(self, version: str | None) -> None:
        """Adds a live request."""
        if version is not None:
            entry = self._entries.setdefault(version, _Entry(waiting_since=self._clock))
            entry.users += 1

    def release(self, version: str | None) -> None:
        """Removes a live request."""
        if version is not None:
            entry = self._entries[version]
            entry.users -= 1
            if not entry.users and not entry.has_slot:
                del self._entries[version]

    def has_users(self, version: str) -> bool:
        """Whether a version has live requests."""
        return version in self._entries and self._entries[version].users > 0

    def begin_use(self, version: str | None) -> None:
        """Adds a running request."""
        if version is not None:
            entry = self._entries[version]
            entry.in_use += 1
            entry.last_used = self._clock

    def end_use(self, version: str | None) -> None:
        """Removes a running request."""
        if version is not None:
            self._entries[version].in_use -= 1

    def mark_loaded(self, version: str) -> None:
        """Makes a version ready."""
        entry = self._entries[version]
        entry.ready, entry.last_used = True, self._clock

    def mark_failed(self, version: str) -> None:
        """Takes a version's slot after its fetch has failed or is not needed any more; the next request retries."""
        entry = self._entries[version]
        entry.has_slot = False
        if not entry.users:
            del self._entries[version]

    @property
    def idle(self) -> tuple[str, ...]:
        """Versions that may lose their slots now, the best to evict first."""
        idle = [
            (not entry.draining, entry.last_used, version)
            for version, entry in self._entries.items()
            if entry.ready and not entry.in_use and (entry.draining or not entry.users)
        ]
        return tuple(version for _, _, version in sorted(idle))

    def evict(self, version: str) -> None:
        """Takes the slot of an idle version; if the version has live requests, it waits for another slot."""
        entry = self._entries[version]
        if not entry.users:
            del self._entries[version]
            return
        entry.has_slot = entry.ready = entry.draining = False
        entry.waiting_since = self._clock

    def advance(self, awaiting_memory: int = 0) -> SlotChanges:
        """Hands out slots; called once per step.

        Args:
            awaiting_memory: Number of versions that have a slot and are fetched, but find no memory: as many others
                start to drain.
        """
        self._clock += 1
        evict: list[str] = []
        load: list[str] = []
        queue = sorted((e.waiting_since, v) for v, e in self._entries.items() if e.users and not e.has_slot)
        free = self.slots - sum(entry.has_slot for entry in self._entries.values()) if queue else 0
        for _, version in queue:
            if free:
                free -= 1
            else:
                if not self.idle:
                    break
                evict.append(self.idle[0])
                self.evict(evict[-1])
            self._entries[version].has_slot = True
            load.append(version)
        overdue = sum(self._clock - since > self._patience_steps for since, _ in queue[len(load) :])
        self._drain(awaiting_memory + overdue)
        return SlotChanges(tuple(evict), tuple(load))

    def check_integrity(self, users: dict[str, int], in_use: dict[str, int]) -> None:
        """Compares the counts with the engine's live and running requests per version.

        Raises:
            EngineFault: They differ, or more slots are taken than there are.
        """
        own_users = {version: entry.users for version, entry in self._entries.items() if entry.users}
        if own_users != users:
            raise EngineFault(f"The versions of live requests are {users}; residency has {own_users}.")
        own_in_use = {version: entry.in_use for version, entry in self._entries.items() if entry.in_use}
        if own_in_use != in_use:
            raise EngineFault(f"The versions of running requests are {in_use}; residency has {own_in_use}.")
        taken = sum(entry.has_slot for entry in self._entries.values())
        if taken > self.slots or any(e.in_use and not e.ready for e in self._entries.values()):
            raise EngineFault(f"{taken} of {self.slots} slots are taken, or one is in use before it is loaded.")

    def _drain(self, count: int) -> None:
        """Drains as many versions as others wait for a slot or memory."""
        # Those that drain already come first, and stop once no version waits. A version that is ready but not in use
        # has yet to get its turn.
        ready = [(version, entry) for version, entry in self._entries.items() if entry.ready]
        for _, entry in ready:
            # Its memory was not enough, or it would be gone: it stays free for those that wait, and another drains too.
            if not entry.in_use:
                entry.draining &= count > 0
        in_use = sorted((not entry.draining, entry.last_used, version) for version, entry in ready if entry.in_use)
        for index, (_, _, version) in enumerate(in_use):
            self._entries[version].draining = index < count
