"""Adapters that were read and packed, kept in the host's memory: between the disk and the slots."""

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
    """Packed adapters by version, in one piece of memory; the one used longest ago leaves first. Any thread may call.

    Args:
        size: bytes; they take up memory only once they are written.
    """

    def __init__(self, size: int) -> None:
        self._memory = host_memory(size)
        self._extents = Extents(size)
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._borrowed: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """That the adapters take."""
        return self._extents.size - self._extents.free_bytes

    def acquire(self, version: str) -> PackedAdapter | None:
        """A version's adapter, if it is here; it stays until `give_back`."""
        with self._lock:
            kept = self._kept.get(version)
            if kept is None:
                return None
            self._kept.move_to_end(version)
            self._borrowed[version] += 1
            return kept.adapter

    def release(self, version: str) -> None:
        """Ends a `borrow`."""
        with self._lock:
            self._borrowed[version] -= 1

    def put(self, version: str, adapter: PackedAdapter) -> None:
        """Keeps a copy of an adapter, in place of others if need be; without it, where they don't make the room."""
        with self._lock:
            offset = None if version in self._kept else self._room(adapter.bytes)
            if offset is not None:
                data = self._memory[offset : offset + adapter.bytes]
                data.copy_(adapter.data)
                self._kept[version] = _Entry(PackedAdapter(data, adapter.table), offset)

    def _room(self, size: int) -> int | None:
        trial, leaving = self._extents.copy(), []
        idle = iter([version for version in self._kept if not self._borrowed[version]])
        while not trial.fits(size):
            version = next(idle, None)
            if version is None:
                return None
            trial.release(self._kept[version].offset, self._kept[version].adapter.bytes)
            leaving.append(version)
        for version in leaving:
            kept = self._kept.pop(version)
            self._extents.release(kept.offset, kept.adapter.bytes)
        return self._extents.allocate(size)
