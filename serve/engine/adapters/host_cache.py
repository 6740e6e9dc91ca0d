"""A cache in host memory of adapters that were read and packed."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch

from loramill.kernels import PackedAdapter
from loramill.kernels.memory import Extents, host_memory, page_locked_blocks


@dataclass(frozen=True, slots=True)
class _Block:
    memory: torch.Tensor
    extents: Extents


@dataclass(frozen=True, slots=True)
class _Entry:
    adapter: PackedAdapter
    block: int
    offset: int


class HostCache:
    """Packed adapters by version, in a few blocks of memory; the least recently used leaves first. Thread-safe."""

    def __init__(self, size: int, *, locked: bool = False) -> None:
        """
        Args:
            size: Number of bytes; unless they are page-locked, they take up memory only once they are written.
            locked: Whether to page-lock the memory, for copies to a GPU; nothing is cached before `prepare`.
        """
        self._blocks = [] if locked else [_Block(host_memory(size), Extents(size))]
        self._bytes_to_lock = size if locked else 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Page-locks the memory if the cache is locked, in seconds for some GB. One thread calls it, once."""
        blocks = [_Block(memory, Extents(memory.numel())) for memory in page_locked_blocks(self._bytes_to_lock)]
        with self._lock:
            self._blocks += blocks

    @property
    def bytes(self) -> int:
        """Bytes that the adapters take up."""
        return sum(block.extents.size - block.extents.free_bytes for block in self._blocks)

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
            place = None if version in self._entries else self._allocate(adapter.bytes)
            if place is not None:
                block, offset = place
                data = self._blocks[block].memory[offset : offset + adapter.bytes]
                data.copy_(adapter.data)
                self._entries[version] = _Entry(PackedAdapter(data, adapter.table), block, offset)

    def _allocate(self, size: int) -> tuple[int, int] | None:
        """Takes `size` bytes; returns the index of their block and their offset in it."""
        trials, evicted = [block.extents.copy() for block in self._blocks], []
        idle = iter([version for version in self._entries if not self._users[version]])
        while not any(trial.fits(size) for trial in trials):
            version = next(idle, None)
            if version is None:
                return None
            entry = self._entries[version]
            trials[entry.block].release(entry.offset, entry.adapter.bytes)
            evicted.append(version)
        for version in evicted:
            entry = self._entries.pop(version)
            self._blocks[entry.block].extents.release(entry.offset, entry.adapter.bytes)
        places = ((index, block.extents.allocate(size)) for index, block in enumerate(self._blocks))
        return next((index, offset) for index, offset in places if offset is not None)
