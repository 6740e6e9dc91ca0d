"""The specification: every operation in float32 and in plain torch, run by run and row by row."""

from __future__ import annotations

import math

import torch

from loramill.kernels.adapters import embedding
from loramill.kernels.adapters.packing import ROWS, Layout
from loramill.kernels.adapters.slab import SiteSlab
from loramill.kernels.backend import Activation, HeadNorms, LayerKV, Quantized, Weight
from loramill.kernels.batch import Batch
from loramill.kernels.paging import Pages

name: str = "reference"
layout: Layout = ROWS
adapt_embedding = embedding.adapt_embedding


def set_threads(threads: int) -> None:
    """Sets the number of CPU threads per operation, for the whole process."""
    torch.set_num_threads(threads)


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Applies each run's adapter; see `loramill.kernels.lora` for the contract."""
    slab.slab.check(batch)
    for run in batch.runs:
        column = 0
        for module, width in enumerate(slab.site.widths):
            delta = slab.delta(run.slot.index, module)
            if delta is not None:
                target = y[run.rows, column : column + width]
                total = target.float() + x[run.rows].float() @ delta.a.float().T @ delta.b.float().T
                target.copy_(total if delta.gain is None else delta.gain * total)
            column += width


def pack(weight: torch.Tensor) -> Weight:
    """Returns the matrix [d_out, d_in] unchanged."""
    return Weight(weight, weight.dtype, *weight.shape)


def pack_quantized(matrix: Quantized, dtype: torch.dtype) -> Weight:
    """Returns the matrix's values."""
    return pack(matrix.values(dtype))


def embed(tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The tokens' rows of the matrix, [rows, d_in]."""
    return weight.data[tokens]


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`x @ weight.T`, [rows, d_out]."""
    return (x.float() @ weight.data.float().T).to(x.dtype)


def adapted_linear(x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
    """`linear`, then `lora` on its result."""
    y = linear(x, weight)
    lora(x, y, slab, batch)
    return y


def pack_experts(weights: torch.Tensor) -> Weight:
    """Returns the matrices [experts, d_out, d_in] unchanged."""
    return Weight(weights, weights.dtype, *weights.shape[1:])


def grouped_linear(x: torch.Tensor, weights: Weight, ends: torch.Tensor) -> torch.Tensor:
    """`linear` of each expert for its own rows."""
    expert_of = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    return torch.einsum("roi,ri->ro", weights.data[expert_of].float(), x.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Root mean square normalization times the weight [d] (Zhang and Sennrich 2019, equation 4)."""
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.float() + offset)).to(x.dtype)


def add_rms_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    inner: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds x, or its inner norm, to the residual in place and normalizes the sum."""
    if inner is not None:
        x = rms_norm(x, inner, eps, offset)
    residual.copy_(residual.float() + x.float())
    return rms_norm(residual, weight, eps, offset)


def gated_activation(gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """`activation(gate) * up`, [rows, d] (Shazeer 2020, equations 5 and 6: GEGLU and SwiGLU)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        return (gate / (1 + (-gate).exp()) * up).to(gate_up.dtype)
    # Hendrycks and Gimpel 2016, section 2.
    angle = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate * (1 + angle.tanh()) / 2 * up).to(gate_up.dtype)


def new_kv(
    layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[LayerKV, ...]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] per layer."""
    shape = (2, layers, blocks, block_size, kv_heads, head_dim)
    keys, values = torch.zeros(shape, dtype=dtype)
    return tuple(LayerKV(k, v, block_size, kv_heads, head_dim) for k, v in zip(keys, values, strict=True))


def rope_write(
    qkv: torch.Tensor,
    heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKV,
    pages: Pages,
    norms: HeadNorms | None = None,
) -> None:
    """Rotates queries and keys (Su et al. 2021, equation 34, pairing the halves of a head); writes keys and values."""
    pages.check(len(qkv), len(kv.keys), kv.block_size)
    if norms is not None:
        norms.apply(rms_norm, qkv, heads, kv)
    split = qkv.view(len(qkv), heads + 2 * kv.kv_heads, kv.head_dim)
    turned = heads + kv.kv_heads
    first, second = split[:, :turned].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    split[:, :heads] = rotated[:, :heads]
    slots = pages.on(qkv.device).slots
    kv.keys.flatten(0, 1)[slots] = rotated[:, heads:]
    kv.values.flatten(0, 1)[slots] = split[:, turned:]


def attention(
    qkv: torch.Tensor,
    heads: int,
    kv: LayerKV,
    pages: Pages,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """`softmax(scale * q k^T) v` (Vaswani et al. 2017, equation 1), row by row."""
    pages.check(len(qkv), len(kv.keys), kv.block_size)
    queries = qkv[:, : heads * kv.head_dim].float().view(len(qkv), kv.kv_heads, heads // kv.kv_heads, kv.head_dim)
    out = torch.empty_like(queries)
    row = 0
    for span in pages.spans:
        blocks = torch.tensor(span.block_table, device=qkv.device)
        keys, values = (part[blocks].flatten(0, 1).float().transpose(0, 1) for part in (kv.keys, kv.values))
        for stop in range(span.start + 1, span.stop + 1):
            seen = slice(0 if window is None else max(0, stop - window), stop)
            scores = scale * queries[row] @ keys[:, seen].mT
            if cap is not None:
                scores = cap * (scores / cap).tanh()
            out[row] = scores.softmax(-1) @ values[:, seen]
            row += 1
    return out.flatten(1).to(qkv.dtype)
