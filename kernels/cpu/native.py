"""The native backend: ctypes over the C kernels of one tier."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import EngineFault
from loramill.kernels.backend import Weight
from loramill.kernels.batch import Batch
from loramill.kernels.cpu.build import library
from loramill.kernels.cpu.layout import OUTPUTS, PANELS, panels
from loramill.kernels.memory import host_memory
from loramill.kernels.slab import SiteSlab

#: Rows of a run that `lora` takes at once: PIECE in lora.c.
_PIECE = 96
_SIGNATURES = {
    "adapted_linear": [
        *(c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        *(c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    ],
}


class Native:
    """The operations of `Backend` on a processor of `tier`, for bfloat16 and float32."""

    name = "cpu"
    layout = PANELS

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self._libraries: dict[torch.dtype, ctypes.CDLL] = {}

    def lora(self, x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
        """Adds each run's adapter; the contract is that of `loramill.kernels.lora`."""
        if batch.runs:
            self._adapt(x, None, y, slab, batch)

    def pack(self, weight: torch.Tensor) -> Weight:
        """Lays a matrix [d_out, d_in] out for `linear` and `embed`."""
        packed = panels(weight)
        memory = host_memory(packed.nbytes).view(packed.dtype).view(packed.shape)
        return Weight(memory.copy_(packed), *weight.shape)

    def embed(self, tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Rows of the matrix."""
        rows = weight.data[tokens // OUTPUTS, :, tokens % OUTPUTS]
        return rows.flatten(1)[:, : weight.d_in].contiguous()

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight.T`."""
        y = torch.empty(len(x), weight.d_out, dtype=x.dtype)
        self._library(x.dtype).adapted_linear(
            *(x.data_ptr(), x.stride(0), weight.data.data_ptr(), y.data_ptr(), weight.d_out, len(x), weight.d_in),
            *(1, ctypes.byref(c_int64(weight.d_out)), None, None, 0, None, 0),
        )
        return y

    def adapted_linear(self, x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
        """`linear`, then `lora` on its result."""
        if not batch.runs:
            return self.linear(x, weight)
        if any(width % OUTPUTS for width in slab.site.widths[:-1]):
            y = self.linear(x, weight)
            self.lora(x, y, slab, batch)
            return y
        y = torch.empty(len(x), weight.d_out, dtype=x.dtype)
        self._adapt(x, weight.data.data_ptr(), y, slab, batch)
        return y

    def _adapt(self, x: torch.Tensor, weight: int | None, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
        slab.slab.check(batch)
        if x.dtype != slab.slab.dtype or y.dtype != x.dtype or len(x) != batch.rows or len(y) != batch.rows:
            raise EngineFault(
                f"x is {x.dtype} {list(x.shape)}, y {y.dtype} {list(y.shape)}; a batch of {batch.rows} rows on a slab "
                f"of {slab.slab.dtype} was expected."
            )
        pieces = _pieces(batch)
        failed = self._library(x.dtype).adapted_linear(
            *(x.data_ptr(), x.stride(0), weight, y.data_ptr(), y.stride(0), len(x), slab.site.d_in),
            *(len(slab.site.widths), slab.widths_address, slab.slab.arena_address, slab.table_address),
            *(slab.table.shape[1], pieces.address, pieces.count),
        )
        if failed:
            raise MemoryError

    def _library(self, dtype: torch.dtype) -> ctypes.CDLL:
        if dtype not in self._libraries:
            self._libraries[dtype] = _open(self.tier, dtype)
        return self._libraries[dtype]


def _open(tier: str, dtype: torch.dtype) -> ctypes.CDLL:
    if dtype not in (torch.bfloat16, torch.float32):
        raise EngineFault(f"The native kernels know bfloat16 and float32, not {dtype}.")
    opened = library(tier, dtype)
    for name, arguments in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes = arguments
    return opened


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The runs of a batch, none longer than `_PIECE`; `address` is that of int32 [count, 3] in `numbers`."""

    numbers: NDArray[np.int32]
    address: int
    count: int


def _pieces(batch: Batch) -> _Pieces:
    pieces = batch.memo.get(_Pieces)
    if pieces is None:
        cuts = [
            (run.slot.index, start, min(start + _PIECE, run.rows.stop))
            for run in batch.runs
            for start in range(run.rows.start, run.rows.stop, _PIECE)
        ]
        numbers = np.array(cuts, dtype=np.int32).reshape(-1, 3)
        pieces = batch.memo[_Pieces] = _Pieces(numbers, numbers.ctypes.data, len(cuts))
    assert isinstance(pieces, _Pieces)
    return pieces
