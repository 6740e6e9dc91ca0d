"""Host memory for weights, and the allocation of parts of a block of memory."""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
import threading
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray

log = logging.getLogger(__name__)

#: Every allocation starts at a cache line.
ALIGNMENT = 64
#: Bytes of a huge page, on systems that have them.
HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23
#: The smallest block of page-locked memory.
_MIN_LOCKED = 1 << 20


def aligned(size: int) -> int:
    """`size` rounded up to whole cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def host_memory(size: int) -> torch.Tensor:
    """Zeroed bytes [size] that start at a cache line, on huge pages where the system has them.

    A page uses memory only once it is written. Weights are read from end to end in each step: with pages of 4 KiB,
    much of the time would be spent on address translation.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Private: shared memory, Python's default, gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + size]


def populate(memory: torch.Tensor) -> None:
    """Populates the pages of host memory that will soon be written, which takes longer than writing to them.

    No byte changes. Does nothing on systems without this call (before Linux 5.14).
    """
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = memory.data_ptr() + memory.numel() - start
    if sys.platform == "linux" and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)


def page_locked(size: int) -> torch.Tensor | None:
    """Page-locked host memory, uint8 [size], not initialized; None, with a warning, if it can't be allocated.

    A GPU copies from and to such memory without the CPU. The driver may stop the device during the allocation, which
    therefore belongs before the first step.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _warn_of_pageable_memory(str(error))
        return None


@functools.cache
def _warn_of_pageable_memory(reason: str) -> None:
    log.warning("no page-locked memory, so that the CPU copies adapters to the GPU: %s", reason)


def page_locked_blocks(size: int) -> list[torch.Tensor]:
    """Host memory of `size` bytes in a few blocks, page-locked as far as that is possible.

    torch rounds page-locked memory up to a power of two, so there is a block for each binary digit of the size, the
    largest first; what remains below 1 MiB is left out.
    """
    blocks: list[torch.Tensor] = []
    left = size // _MIN_LOCKED * _MIN_LOCKED
    while left:
        block = page_locked(1 << (left.bit_length() - 1))
        blocks.append(host_memory(left) if block is None else block)
        left -= blocks[-1].numel()
    return blocks


def copy_to_device(numbers: NDArray[Any], to: torch.Tensor) -> None:
    """Copies asynchronously to a device; torch keeps the page-locked memory until the stream has read it."""
    to.copy_(_page_locked(numbers, to.device), non_blocking=True)


def to_device(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The numbers on a device, copied asynchronously; on the CPU, the tensor shares the array's memory."""
    return _page_locked(numbers, device).to(device, non_blocking=True)


def _page_locked(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(numbers)
    return host.pin_memory() if device.type == "cuda" else host


class HostPool:
    """Host memory for many tensors of the same lifetime, adjacent so that none needs pages of its own.

    A chunk is freed once no tensor in it is left.
    """

    def __init__(self, chunk: int = 64 << 20) -> None:
        self._chunk = chunk
        self._left = host_memory(0)

    def allocate(self, size: int) -> torch.Tensor:
        """Zeroed bytes [size] that start at a cache line."""
        whole = aligned(size)
        if whole > self._left.numel():
            self._left = host_memory(max(whole, self._chunk))
        taken, self._left = self._left[:size], self._left[whole:]
        return taken


#: From a size to bytes [size] of any content.
Allocator = Callable[[int], torch.Tensor]


class Recycler:
    """Reuses host memory: new pages take far longer to write than pages that exist. Thread-safe.

    Keeps at most `size` unused bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def allocate(self, size: int) -> torch.Tensor:
        """Bytes [size] that start at a cache line; their content is arbitrary."""
        with self._lock:
            fitting = [index for index, memory in enumerate(self._free) if memory.numel() >= size]
            best = min(fitting, key=lambda index: self._free[index].numel(), default=None)
            memory = None if best is None else self._free.pop(best)
        return (host_memory(size) if memory is None else memory)[:size]

    def release(self, memory: torch.Tensor) -> None:
        """Returns memory from `allocate` that is no longer used."""
        whole = memory.untyped_storage().nbytes() - memory.storage_offset()
        with self._lock:
            self._free.append(memory.as_strided((whole,), (1,)))
            while sum(free.numel() for free in self._free) > self._size:
                self._free.pop(0)

    @contextmanager
    def lending(self) -> Iterator[Allocator]:
        """An allocator whose memory is released at the end."""
        lent: list[torch.Tensor] = []

        def lend(size: int) -> torch.Tensor:
            lent.append(self.allocate(size))
            return lent[-1]

        try:
            yield lend
        finally:
            for memory in lent:
                self.release(memory)


class Extents:
    """The free parts of `size` bytes: first fit; adjacent free parts are joined."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []

    @property
    def free_bytes(self) -> int:
        """Free bytes, adjacent or not."""
        return sum(size for _, size in self._free)

    def copy(self) -> Extents:
        """An independent copy."""
        other = Extents(0)
        other.size, other._free = self.size, list(self._free)
        return other

    def fits(self, size: int) -> bool:
        """Whether `allocate(size)` would succeed."""
        return any(free >= aligned(size) for _, free in self._free) or not size

    def allocate(self, size: int) -> int | None:
        """Takes `size` adjacent bytes, rounded up to cache lines; returns the offset, or None if no part fits."""
        size = aligned(size)
        if not size:
            return 0
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        return None

    def release(self, offset: int, size: int) -> None:
        """Frees a part that `allocate` returned."""
        if not size:
            return
        insort(self._free, (offset, aligned(size)))
        joined: list[tuple[int, int]] = []
        for start, length in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self._free = joined

    def faults(self, taken: list[tuple[int, int]]) -> list[str]:
        """Describes overlapping and lost parts, given that exactly `taken` (offset, size) are in use."""
        parts = sorted([*self._free, *((offset, aligned(size)) for offset, size in taken if size)])
        end, faults = 0, []
        for offset, size in [*parts, (self.size, 0)]:
            if offset != end:
                faults.append(
                    f"bytes {min(end, offset)} to {max(end, offset)} are {'lost' if offset > end else 'taken twice'}"
                )
            end = offset + size
        return faults
