"""What a backend of the kernels offers: the operations of a decoder's step, over weights that it lays out itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from loramill.errors import EngineFault
from loramill.kernels.adapter import Layout
from loramill.kernels.batch import Batch
from loramill.kernels.slab import SiteSlab

if TYPE_CHECKING:
    from loramill.kernels.paging import Pages


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [d_out, d_in] of small codes: in a dtype it is `(levels[codes] * scales).to(dtype)`, in float32 first.

    Attributes:
        codes: [d_out, d_in]: uint8, each one of the levels; or int8, where they are the numbers themselves.
        levels: float32 [16]; None: the codes are int8.
        scales: float32 [d_out, d_in / group]: of `group` neighbouring inputs each, a multiple of four or all.

    Raises:
        EngineFault: these don't fit each other.
    """

    codes: torch.Tensor
    levels: torch.Tensor | None
    scales: torch.Tensor

    def __post_init__(self) -> None:
        codes, levels, scales = self.codes, self.levels, self.scales
        if levels is None:
            fits = codes.dtype == torch.int8
        else:
            fits = codes.dtype == torch.uint8 and levels.dtype == torch.float32 and levels.shape == (16,)
        fits = fits and scales.dtype == torch.float32 and codes.ndim == scales.ndim == 2 and scales.numel() > 0
        fits = fits and len(codes) == len(scales) and codes.shape[1] % scales.shape[1] == 0
        fits = fits and (scales.shape[1] == 1 or self.group % 4 == 0) and (levels is None or bool(codes.max() < 16))
        if not fits:
            raise EngineFault(
                f"Codes {codes.dtype} {list(codes.shape)} and scales {scales.dtype} {list(scales.shape)} with "
                f"{'no' if levels is None else list(levels.shape)} levels make no matrix."
            )

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix itself, [d_out, d_in]."""
        numbers = self.codes.float() if self.levels is None else self.levels[self.codes.int()]
        return (numbers * self.scales.repeat_interleave(self.group, dim=1)).to(dtype)


@dataclass(frozen=True, slots=True)
class Codebook:
    """What the codes of a quantized weight stand for, as its backend laid it out."""

    levels: torch.Tensor | None
    scales: torch.Tensor
    group: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A frozen matrix [d_out, d_in] as its backend laid it out, for x of `dtype`; with a codebook, `data` are codes."""

    data: torch.Tensor
    dtype: torch.dtype
    d_out: int
    d_in: int
    codebook: Codebook | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's paged keys and values as their backend laid them out, in blocks of `block_size` positions."""

    keys: torch.Tensor
    values: torch.Tensor
    block_size: int
    kv_heads: int
    head_dim: int


class Backend(Protocol):
    """Operations on rows of bfloat16 or float32; sums are in float32. Each says what it does in torch.

    Attributes:
        name: as in LORAMILL_KERNELS.
        layout: how adapters lie in a slab for `lora`.
    """

    name: str
    layout: Layout

    def set_threads(self, threads: int) -> None:
        """So many CPU threads share an operation from now on, in the whole process."""

    def lora(self, x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
        """Adds each run's adapter; the contract is that of `loramill.kernels.lora`."""

    def pack(self, weight: torch.Tensor) -> Weight:
        """Lays a matrix [d_out, d_in] out for `linear`, `adapted_linear` and `embed`, for x of its dtype."""

    def pack_quantized(self, matrix: Quantized, dtype: torch.dtype) -> Weight:
        """The same for x of a dtype: all results are those of `pack(matrix.values(dtype))`, in less memory."""

    def embed(self, tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Rows of the matrix: `weight[tokens]`, for int64 tokens [rows]; returns [rows, d_in]."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight.T` for x [rows, d_in], whose rows may be strided; returns [rows, d_out] of x's dtype."""

    def adapted_linear(self, x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
        """`linear`, then `lora` on its result."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x / sqrt(mean(x ** 2) + eps) * weight` over the last of x [..., d], whose rows may be strided."""

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Adds x to the residual in place, both [rows, d]; returns `rms_norm(residual, weight, eps)`."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` for [gate, up] side by side in [rows, 2 d]; returns [rows, d]."""

    def new_kv(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[LayerKV, ...]:
        """Paged keys and values of all layers; memory is taken up only as blocks are written."""

    def rope_write(
        self, qkv: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, kv: LayerKV, pages: Pages
    ) -> None:
        """Rotates queries and keys by their rows' angles, the queries in place; writes keys and values to the pages.

        Args:
            qkv: [rows, (heads + 2 kv_heads) * head_dim].
            heads: of the queries.
            cos: [rows, head_dim / 2] float32; the halves of a head are the pairs that turn.
            sin: as cos.
            kv: of the layer.
            pages: of the step.
        """

    def attention(
        self, qkv: torch.Tensor, heads: int, kv: LayerKV, pages: Pages, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """Each row's queries over its sequence's keys up to its own position, once `rope_write` wrote them.

        Args:
            qkv: as `rope_write` left it; only the queries are read.
            heads: of the queries; a multiple of kv_heads, neighbours share one.
            kv: of the layer.
            pages: of the step.
            scale: of the scores.
            window: positions that a row sees, its own counted; None: all.

        Returns:
            [rows, heads * head_dim].
        """
