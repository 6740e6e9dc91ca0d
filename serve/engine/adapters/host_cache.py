"""A cache in host memory of adapters that were read and packed."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass

from loramill.kernels import PackedAdapter
from loramill.kernels.memory import Extents, host_memory


@dataclass(frozen=True, slots=True)
class _Entry:
    adapter: PackedAdapter
    offset: int


class HostCache:
    """Packed adapters by version, in one block of memory; the least recently used leaves first. Thread-safe."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: Bytes; they take up memory only once they are written.
        """
        self._memory = host_memory(size)
        self._extents = Extents(size)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Bytes that the adapters take up."""
        return self._extents.size - self._extents.free_bytes

    def acquire(self, version: str) -> PackedAdapter | None:
        """A version's adapter, which stays in the cache until `release`; None if it is not cached."""
        with self._lock:
            entry = self._entries.get(version)
            if entry is None:
                return None
            self._entries.move_to_end(version)
            self._users[version] += 1
            return entry.adapter

    def release(self, version: str) -> None:
        """Ends the use that an `acquire` started."""
        with self._lock:
            self._users[version] -= 1

    def put(self, version: str, adapter: PackedAdapter) -> None:
        """Copies an adapter into the cache, in place of others if need be; skips it if there is no room."""
        with self._lock:
            offset = None if version in self._entries else self._allocate(adapter.bytes)
            if offset is not None:
                data = self._memory[offset : offset + adapter.bytes]
                data.copy_(adapter.data)
                self._entries[version] = _Entry(PackedAdapter(data, adapter.table), offset)

    def _allocate(self, size: int) -> int | None:
        trial, evicted = self._extents.copy(), []
        idle = iter([version for version in self._entries if not self._users[version]])
        while not trial.fits(size):
            version = next(idle, None)
            if version is None:
                return None
            trial.release(self._entries[version].offset, self._entries[version].adapter.bytes)
            evicted.append(version)
        for version in evicted:
            entry = self._entries.pop(version)
            self._extents.release(entry.offset, entry.adapter.bytes)
        return self._extents.allocate(size)
