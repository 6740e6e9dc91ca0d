"""The norms of weights with an adapter on them, computed on their device while the engine steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loramill.kernels.peft_folder import merged_norms

#: Bytes of the rows that a GPU merges at once in float32; it takes about four times as many.
CHUNK_BYTES = 8 << 20


class MergedNorms:
    """Computes `merged_norms` on a device; on a GPU in one thread at a time, some rows at a time, on its own stream.

    The linears of an 8B model are 14 GB, which a GPU reads in 5 ms. On one CPU thread their norms took 69 s, and each
    weight's copy to the host held up the steps.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: Of the weights, which are complete once it has computed what is launched so far.
        """
        self._device = device
        self._lock = threading.Lock()
        self._chunk_bytes: int | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._chunk_bytes = CHUNK_BYTES
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(
        self,
        weight: Callable[[torch.Tensor], torch.Tensor],
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The norms, float32 [d_out] on the host.

        Args:
            weight: Returns some of the rows, [rows, d_in], given their numbers, int64 [rows] on the device.
            a: [r, d_in].
            b: [d_out, r].
            scale: Factor of their product.
        """
        at_once = len(b) if self._chunk_bytes is None else max(1, self._chunk_bytes // (4 * a.shape[1]))
        with self._on_stream():
            a, b = a.to(self._device), b.to(self._device)
            rows = torch.split(torch.arange(len(b), device=self._device), at_once)
            return torch.cat([merged_norms(weight(some), a, b[some], scale) for some in rows]).cpu()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with self._lock, torch.cuda.stream(self._stream):
                yield
