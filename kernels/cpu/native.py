"""The native backend: calls the C kernels of one tier through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import EngineFault, SetupError
from loramill.kernels import torch_backend
from loramill.kernels.adapters.embedding import adapt_embedding
from loramill.kernels.adapters.slab import SiteSlab
from loramill.kernels.backend import Activation, Codebook, HeadNorms, LayerKV, Quantized, Weight
from loramill.kernels.batch import Batch
from loramill.kernels.cpu import decoder_ops, training_layers, training_lora
from loramill.kernels.cpu.build import library, supported_tiers
from loramill.kernels.cpu.layers import in_blocks, matrix, run_layers
from loramill.kernels.cpu.layout import (
    OUTPUTS,
    PANELS,
    byte_panels,
    nibble_panels,
    panels,
    rows_of_bytes,
    rows_of_nibbles,
    scale_panels,
)
from loramill.kernels.layers import Stack, Step
from loramill.kernels.memory import HostPool
from loramill.kernels.paging import Pages

#: Number of rows of a run that `lora` processes at once: PIECE in the C sources.
_PIECE = 96
#: Counts and strides are declared as pointers too, as in `decoder_ops`.
_SIGNATURES: dict[str, list[Any]] = {
    "adapted_linear": [c_void_p] * 15,
    "lay_out": [c_void_p] * 2,
    "take_rows": [c_void_p] * 5,
    "run_layers": [c_void_p] * 3,
    "set_threads": [c_int],
    **decoder_ops.SIGNATURES,
    **training_layers.SIGNATURES,
    **training_lora.SIGNATURES,
}


def open_native(tier: str | None = None) -> Native:
    """The backend of a tier, by default the best that the processor supports, with its kernels compiled.

    Raises:
        SetupError: The processor does not support the tier, or any, or no compiler can compile the kernels.
    """
    tiers = supported_tiers()
    if not tiers or tier not in (None, *tiers):
        raise SetupError(f"The native kernels need {tier or 'AVX2'}; this processor has {', '.join(tiers) or 'none'}.")
    native = Native(tier or tiers[0])
    native.warm_up()
    return native


class Native:
    """Implements `Backend` on processors of a tier, for bfloat16 and float32."""

    def __init__(self, tier: str) -> None:
        self.layout = replace(PANELS, copy=self._copy_laid_out)
        self.name = f"cpu-{tier}"
        self._tier = tier
        self._threads = 1
        self._pool = HostPool()
        self._libraries: dict[torch.dtype, ctypes.CDLL] = {}

    def lora(self, x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
        """Applies each run's adapter; see `loramill.kernels.lora` for the contract."""
        if batch.runs:
            self._adapt(x, None, y, slab, batch)

    def pack(self, weight: torch.Tensor) -> Weight:
        """Converts a matrix [d_out, d_in] to the layout of `linear` and `embed`."""
        return Weight(self._store(panels(weight)), weight.dtype, *weight.shape)

    def pack_quantized(self, matrix: Quantized, dtype: torch.dtype) -> Weight:
        """Converts the codes to the layout of `pack`; indices of levels take four bits."""
        if matrix.codes.dtype == torch.float8_e4m3fn:
            raise EngineFault("The kernels for CPUs don't read float8 weights; quantize to int8.")
        levels = None if matrix.levels is None else matrix.levels.contiguous()
        lay_out = byte_panels if levels is None else nibble_panels
        codebook = Codebook(levels, self._store(scale_panels(matrix.scales)), matrix.group)
        return Weight(self._store(lay_out(matrix.codes, dtype)), dtype, *matrix.codes.shape, codebook=codebook)

    def _store(self, laid_out: torch.Tensor) -> torch.Tensor:
        memory = self._pool.allocate(laid_out.nbytes).view(laid_out.dtype).view(laid_out.shape)
        return memory.copy_(laid_out)

    def embed(self, tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Rows of the matrix."""
        codebook = weight.codebook
        if codebook is None:
            return self._rows(tokens, weight)
        block, output = tokens // OUTPUTS, tokens % OUTPUTS
        if codebook.levels is None:
            numbers = rows_of_bytes(weight.data, tokens, weight.dtype).float()
        else:
            numbers = codebook.levels[rows_of_nibbles(weight.data, tokens, weight.dtype).int()]
        scales = codebook.scales[block, :, output].repeat_interleave(codebook.group, dim=1)
        return (numbers[:, : weight.d_in] * scales).to(weight.dtype)

    def _rows(self, tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
        y = torch.empty(len(tokens), weight.d_in, dtype=weight.dtype)
        indices: NDArray[np.int64] = tokens.numpy()
        if len(indices) and not 0 <= indices.min() <= indices.max() < weight.d_out:
            raise EngineFault(f"Rows {indices.min()} to {indices.max()} are out of a matrix of {weight.d_out} rows.")
        indices = np.ascontiguousarray(indices)
        self._library(weight.dtype).take_rows(
            indices.ctypes.data, len(indices), weight.data.data_ptr(), weight.d_in, y.data_ptr()
        )
        return y

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight.T`."""
        _check(x, weight)
        y = torch.empty(len(x), weight.d_out, dtype=x.dtype)
        failed = self._library(x.dtype).adapted_linear(
            *(x.data_ptr(), x.stride(0), ctypes.byref(matrix(weight)), y.data_ptr(), weight.d_out, *x.shape),
            *(1, ctypes.byref(c_int64(weight.d_out)), None, None, 0, None, 0, 0),
        )
        if failed:
            raise MemoryError
        return y

    def adapted_linear(self, x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
        """`linear`, then `lora` on its result."""
        if not batch.runs:
            return self.linear(x, weight)
        if not in_blocks(slab.site.widths):
            y = self.linear(x, weight)
            self.lora(x, y, slab, batch)
            return y
        _check(x, weight)
        y = torch.empty(len(x), weight.d_out, dtype=x.dtype)
        self._adapt(x, weight, y, slab, batch)
        return y

    def _adapt(self, x: torch.Tensor, weight: Weight | None, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
        slab.slab.check(batch)
        (rows, d_in), (ld, step), shape, (ldy, step_y) = x.shape, x.stride(), y.shape, y.stride()
        fits = rows == batch.rows and d_in == slab.site.d_in and shape == (rows, slab.columns)
        of_bytes = slab.slab.dtype == torch.int8
        dtype = torch.bfloat16 if of_bytes else slab.slab.dtype
        if not fits or not x.dtype == y.dtype == dtype or step != 1 or step_y != 1:
            raise EngineFault(
                f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}, y {y.dtype} {list(shape)} with "
                f"{y.stride()}; they must be {dtype} {[batch.rows, slab.site.d_in]} and {[batch.rows, slab.columns]} "
                "with contiguous rows."
            )
        pieces = _pieces(batch)
        failed = self._library(x.dtype).adapted_linear(
            *(x.data_ptr(), ld, weight and ctypes.byref(matrix(weight)), y.data_ptr(), ldy, rows, d_in),
            *(len(slab.site.widths), slab.widths_address, slab.slab.arena_address, slab.table_address),
            *(slab.table.shape[1], pieces.address, pieces.count, of_bytes),
        )
        if failed:
            raise MemoryError

    def pack_experts(self, weights: torch.Tensor) -> Weight:
        """Converts the matrices [experts, d_out, d_in] to the layout of `linear`, one after the other."""
        first = panels(weights[0])
        packed = self._pool.allocate(len(weights) * first.nbytes).view(first.dtype).view(len(weights), *first.shape)
        for place, weight in zip(packed, weights, strict=True):
            place.copy_(panels(weight))
        return Weight(packed, weights.dtype, *weights.shape[1:])

    def grouped_linear(self, x: torch.Tensor, weights: Weight, ends: torch.Tensor) -> torch.Tensor:
        """`linear` of each expert for its own rows."""
        parts = [
            self.linear(x[start:end], replace(weights, data=weights.data[expert]))
            for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()]))
            if start < end
        ]
        return torch.cat(parts) if parts else x.new_empty(0, weights.d_out)

    def adapt_embedding(
        self, tokens: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch, scale: float = 1.0
    ) -> None:
        """Applies each run's adapter of an embedding."""
        adapt_embedding(tokens, y, slab, batch, scale)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """Normalizes the last axis of x [..., d]."""
        if offset:
            return torch_backend.rms_norm(x, weight, eps, offset)
        return decoder_ops.rms_norm(self._library(x.dtype), x, weight, eps)

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adds x, or its inner norm, to the residual in place and normalizes the sum."""
        if inner is not None:
            x = self.rms_norm(x, inner, eps, offset)
        if offset:
            return torch_backend.add_rms_norm(residual, x, weight, eps, offset)
        return decoder_ops.add_rms_norm(self._library(x.dtype), residual, x, weight, eps)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """`activation(gate) * up`."""
        if activation != "silu":
            return torch_backend.gated_activation(gate_up, activation)
        return decoder_ops.silu_mul(self._library(gate_up.dtype), gate_up)

    def new_kv(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[LayerKV, ...]:
        """Paged keys and values for all layers."""
        return decoder_ops.new_kv(layers, blocks, block_size, kv_heads, head_dim, dtype)

    def rope_write(
        self,
        qkv: torch.Tensor,
        heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: LayerKV,
        pages: Pages,
        norms: HeadNorms | None = None,
    ) -> None:
        """Rotates queries in place; rotates keys and writes them, and the values, to their pages."""
        if norms is not None:
            norms.apply(self.rms_norm, qkv, heads, kv)
        decoder_ops.rope_write(self._library(qkv.dtype), qkv, heads, cos, sin, kv, pages)

    def attention(
        self,
        qkv: torch.Tensor,
        heads: int,
        kv: LayerKV,
        pages: Pages,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
    ) -> torch.Tensor:
        """Attention of each row to its sequence's positions."""
        return decoder_ops.attention(self._library(qkv.dtype), qkv, heads, kv, pages, scale, window, cap)

    def run_layers(self, stack: Stack, x: torch.Tensor, cache: Sequence[LayerKV], step: Step) -> torch.Tensor:
        """Runs all layers in one call; see `loramill.kernels.layers.run_layers`."""
        pieces = _pieces(step.batch)
        return run_layers(self._library(x.dtype), stack, x, cache, step, (pieces.address, pieces.count))

    def training_library(self, dtype: torch.dtype) -> ctypes.CDLL:
        """The kernels of `training_lora` and `training_layers`, which run on as many threads as torch uses now."""
        if self._threads != torch.get_num_threads():
            self.set_threads(torch.get_num_threads())
        return self._library(dtype)

    def set_threads(self, threads: int) -> None:
        """Sets the number of threads per operation, for the whole process; they sleep between operations."""
        torch.set_num_threads(threads)
        self._threads = threads
        for opened in self._libraries.values():
            opened.set_threads(threads)

    def warm_up(self) -> None:
        """Compiles the kernels unless they are cached.

        Raises:
            SetupError: There is no compiler, or it can't compile them.
        """
        self._library(torch.bfloat16)

    def _copy_laid_out(self, placings: NDArray[np.void], dtype: torch.dtype) -> None:
        self._library(dtype).lay_out(placings.ctypes.data, len(placings))

    def _library(self, dtype: torch.dtype) -> ctypes.CDLL:
        if dtype not in self._libraries:
            self._libraries[dtype] = _open(self._tier, dtype)
            self._libraries[dtype].set_threads(self._threads)
        return self._libraries[dtype]


def _check(x: torch.Tensor, weight: Weight) -> None:
    if x.dtype != weight.dtype or x.shape[1] != weight.d_in or x.stride(1) != 1:
        raise EngineFault(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}; it must be {weight.dtype} "
            f"[rows, {weight.d_in}] with contiguous rows."
        )


def _open(tier: str, dtype: torch.dtype) -> ctypes.CDLL:
    if dtype not in (torch.bfloat16, torch.float32):
        raise EngineFault(f"The native kernels support bfloat16 and float32, not {dtype}.")
    opened = library(tier, dtype)
    for name, arguments in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes = arguments
    return opened


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The runs of a batch, cut into pieces of up to `_PIECE` rows; `address` is that of `numbers`, int32 [count, 3]."""

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
