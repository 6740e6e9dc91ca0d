"""The interface of a kernel backend: the operations of a decoder's step, on weights in the backend's own layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from loramill.errors import EngineFault
from loramill.kernels.adapters.packing import Layout
from loramill.kernels.adapters.slab import SiteSlab
from loramill.kernels.batch import Batch

if TYPE_CHECKING:
    from loramill.kernels.paging import Pages


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized matrix [d_out, d_in]: its values are `(levels[codes] * scales).to(dtype)`, computed in float32.

    Attributes:
        codes: [d_out, d_in]: uint8 indices of levels, or int8 or float8_e4m3fn values.
        levels: float32 [16]; None: the codes are values.
        scales: float32 [d_out, d_in / group]: one per `group` adjacent inputs; a group is a multiple of four or all.

    Raises:
        EngineFault: Shapes or dtypes do not match.
    """

    codes: torch.Tensor
    levels: torch.Tensor | None
    scales: torch.Tensor

    def __post_init__(self) -> None:
        codes, levels, scales = self.codes, self.levels, self.scales
        if levels is None:
            fits = codes.dtype in (torch.int8, torch.float8_e4m3fn)
        else:
            fits = codes.dtype == torch.uint8 and levels.dtype == torch.float32 and levels.shape == (16,)
        fits = fits and scales.dtype == torch.float32 and codes.ndim == scales.ndim == 2 and scales.numel() > 0
        fits = fits and len(codes) == len(scales) and codes.shape[1] % scales.shape[1] == 0
        fits = fits and (scales.shape[1] == 1 or self.group % 4 == 0) and (levels is None or bool(codes.max() < 16))
        if not fits:
            raise EngineFault(
                f"Codes {codes.dtype} {list(codes.shape)} and scales {scales.dtype} {list(scales.shape)} with "
                f"{'no' if levels is None else list(levels.shape)} levels don't form a quantized matrix."
            )

    @property
    def group(self) -> int:
        """Number of inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized matrix, [d_out, d_in]."""
        numbers = self.codes.float() if self.levels is None else self.levels[self.codes.int()]
        return (numbers * self.scales.repeat_interleave(self.group, dim=1)).to(dtype)


@dataclass(frozen=True, slots=True)
class Codebook:
    """Levels and scales of a quantized weight, in its backend's layout."""

    levels: torch.Tensor | None
    scales: torch.Tensor
    group: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A frozen matrix [d_out, d_in] in its backend's layout, for x of `dtype`; with a codebook, `data` holds codes."""

    data: torch.Tensor
    dtype: torch.dtype
    d_out: int
    d_in: int
    codebook: Codebook | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's paged keys and values in their backend's layout, in blocks of `block_size` positions."""

    keys: torch.Tensor
    values: torch.Tensor
    block_size: int
    kv_heads: int
    head_dim: int


#: The function that an MLP applies to its gate: SiLU, or GELU by its approximation with tanh.
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of query and key heads, before these are rotated; see `Backend.rms_norm`.

    Attributes:
        q: [head_dim], for each query head.
        k: [head_dim], for each key head.
        eps: Epsilon of both norms.
        offset: A number that is added to both weights.
    """

    q: torch.Tensor
    k: torch.Tensor
    eps: float
    offset: float = 0.0

    def apply(self, rms_norm: Callable[..., torch.Tensor], qkv: torch.Tensor, heads: int, kv: LayerKV) -> None:
        """Normalizes query and key heads in place.

        Args:
            rms_norm: The `rms_norm` of a backend.
            qkv: [rows, (heads + 2 kv_heads) * head_dim]; its values are unchanged.
            heads: Number of query heads.
            kv: The layer's keys and values, for the shapes.
        """
        split = qkv.view(len(qkv), -1, kv.head_dim)
        for part, weight in ((split[:, :heads], self.q), (split[:, heads : heads + kv.kv_heads], self.k)):
            part.copy_(rms_norm(part, weight, self.eps, self.offset))


class Backend(Protocol):
    """Operations on rows of bfloat16 or float32, with sums in float32. Each is described by its equivalent in torch.

    Attributes:
        name: As in LORAMILL_KERNELS.
        layout: The layout of adapters in a slab for `lora`.
    """

    name: str
    layout: Layout

    def set_threads(self, threads: int) -> None:
        """Sets the number of CPU threads per operation, for the whole process."""

    def lora(self, x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
        """Applies each run's adapter; see `loramill.kernels.lora` for the contract."""

    def pack(self, weight: torch.Tensor) -> Weight:
        """Converts a matrix [d_out, d_in] to the layout of `linear`, `adapted_linear` and `embed`."""

    def pack_quantized(self, matrix: Quantized, dtype: torch.dtype) -> Weight:
        """Like `pack(matrix.values(dtype))`, with the same results in less memory.

        Codes in float8 are for GPUs, where `linear` rounds x to float8 as well.

        Raises:
            EngineFault: The codes are float8, and the backend has no product for them.
        """

    def embed(self, tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Rows of the matrix: `weight[tokens]`, for int64 tokens [rows]; returns [rows, d_in]."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight.T` for x [rows, d_in], whose rows may be strided; returns [rows, d_out] of x's dtype."""

    def adapted_linear(self, x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
        """`linear`, then `lora` on its result."""

    def adapt_embedding(
        self, tokens: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch, scale: float = 1.0
    ) -> None:
        """Applies each run's adapter of an embedding; see `loramill.kernels.adapters.embedding.adapt_embedding`."""

    def pack_experts(self, weights: torch.Tensor) -> Weight:
        """Converts matrices [experts, d_out, d_in] to the layout of `grouped_linear`; `data` has an axis of experts."""

    def grouped_linear(self, x: torch.Tensor, weights: Weight, ends: torch.Tensor) -> torch.Tensor:
        """`linear` of each expert for its own rows of x [rows, d_in]; returns [rows, d_out].

        Args:
            x: The rows of the first expert, followed by those of the second, and so on.
            weights: From `pack_experts`.
            ends: int32 [experts], on x's device: the end of each expert's rows.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """`x / sqrt(mean(x ** 2) + eps) * (weight + offset)` over the last axis of x [..., d].

        Rows of x may be strided. The offset is 1 in the Gemma family.
        """

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adds x to the residual in place, both [rows, d]; returns `rms_norm(residual, weight, eps, offset)`.

        With the weight [d] of an inner norm, `rms_norm(x, inner, eps, offset)` is added instead, as in Gemma 2.
        """

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """`activation(gate) * up` for [gate, up] side by side in [rows, 2 d]; returns [rows, d]."""

    def new_kv(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[LayerKV, ...]:
        """Paged keys and values for all layers; memory is used only as blocks are written."""

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
        """Rotates queries and keys by their rows' angles, the queries in place; writes keys and values to the pages.

        Args:
            qkv: [rows, (heads + 2 kv_heads) * head_dim]; afterwards, only its queries and values are defined.
            heads: Number of query heads.
            cos: float32 [rows, head_dim / 2]; pairs consist of an element of each half of a head.
            sin: Like cos.
            kv: The layer's keys and values.
            pages: The paging of the step.
            norms: The norms that heads pass through before they are rotated; None: heads are not normalized.
        """

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
        """Attention of each row to its sequence's positions up to its own, after `rope_write`.

        Args:
            qkv: As `rope_write` left it; only the queries are read.
            heads: Number of query heads; a multiple of kv_heads, adjacent ones share a KV head.
            kv: The layer's keys and values.
            pages: The paging of the step.
            scale: Factor of the scores.
            window: Number of positions that a row sees, including its own; None: all.
            cap: Scores become `cap * tanh(score / cap)`, as in Gemma 2; None: they are not capped.

        Returns:
            [rows, heads * head_dim].
        """
