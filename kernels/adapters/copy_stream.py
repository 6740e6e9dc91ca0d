"""Copies of adapters to a device, ordered with the kernels that read them.

On a GPU, kernels run on one stream and copies on another, so that no step waits for a copy:

- A copy may target bytes that launched kernels still read: those of a freed slot, which a graph or a pass that was
  launched ahead may use. The copy therefore waits on the device for a `mark` of the kernels' stream, which was made
  when the bytes were freed.
- A kernel may read the copied bytes only after the copy has ended. `copy` therefore returns at that point, and the
  engine gets the slot afterwards. If kernels waited for the copy on the device instead, one row's adapter would hold up
  all rows of a step.
- Once `copy` has returned, its source may be reused or freed. A slab that is dropped stays in memory until a copy into
  it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Protocol

import torch

from loramill.kernels.memory import page_locked

#: Bytes of each of the two buffers through which memory that is not page-locked is copied.
STAGE_BYTES = 8 << 20

#: A point in a device's computation.
Mark = Hashable


class CopyStream(Protocol):
    """Copies to one device."""

    def mark(self) -> Mark:
        """Everything that the calling thread has launched so far; called by the thread that launches kernels."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Mark) -> None:
        """Copies bytes [n] from the host to bytes [n] on the device, and returns once they are copied.

        Any thread may call it; copies run one after another.

        Args:
            source: uint8 [n] on the host.
            target: uint8 [n] on the device.
            after: The copy starts once the device has computed this.
        """


def new_copy_stream(device: torch.device) -> CopyStream:
    """Returns the copies to a device."""
    return CudaCopyStream(device) if device.type == "cuda" else HostCopies()


class HostCopies:
    """Copies to a device that finishes each operation before the call returns, so nothing is pending."""

    def mark(self) -> Mark:
        """See `CopyStream.mark`."""
        return None

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Mark) -> None:
        """See `CopyStream.copy`."""
        target.copy_(source)


class CudaCopyStream:
    """Copies to a GPU on a stream of their own.

    Page-locked memory is copied directly. Other memory goes piece by piece through two page-locked buffers: while one
    is copied to the GPU, the other is filled. The driver would do the same, but with its locks held, so that the
    engine's thread could not launch kernels meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # torch has 32 streams per priority and hands them out in turn. With another priority, this stream is never one
        # on which a graph is captured.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        # Allocated before the first step, since the driver may stop the device to page-lock memory.
        stages = [page_locked(STAGE_BYTES) for _ in range(2)]
        self._stages = [(stage, self._event()) for stage in stages if stage is not None]

    def mark(self) -> torch.cuda.Event:
        """See `CopyStream.mark`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Mark) -> None:
        """See `CopyStream.copy`."""
        assert isinstance(after, torch.cuda.Event)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            if source.is_pinned() or not self._stages:
                target.copy_(source, non_blocking=True)
            else:
                self._copy_in_pieces(source, target)
            copied = self._event()
            copied.record(self._stream)
            copied.synchronize()

    def _copy_in_pieces(self, source: torch.Tensor, target: torch.Tensor) -> None:
        pieces = zip(torch.split(source, STAGE_BYTES), torch.split(target, STAGE_BYTES), strict=True)
        for index, (piece, to) in enumerate(pieces):
            stage, sent = self._stages[index % len(self._stages)]
            sent.synchronize()
            stage[: len(piece)].copy_(piece)
            to.copy_(stage[: len(piece)], non_blocking=True)
            sent.record(self._stream)

    def _event(self) -> torch.cuda.Event:
        # The waiting thread sleeps; if it polled, it might take the engine's core.
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
