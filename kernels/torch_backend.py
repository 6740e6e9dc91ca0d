"""The operations in plain torch, on any device and in x's own dtype, for machines without native kernels."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from loramill.kernels.adapters import embedding
from loramill.kernels.adapters.packing import ROWS, Layout
from loramill.kernels.adapters.slab import SiteSlab
from loramill.kernels.attention import paged
from loramill.kernels.backend import Activation, Codebook, HeadNorms, LayerKV, Quantized, Weight
from loramill.kernels.batch import Batch
from loramill.kernels.paging import Pages

name: str = "torch"
layout: Layout = ROWS
adapt_embedding = embedding.adapt_embedding
attention = paged.attention


def set_threads(threads: int) -> None:
    """Sets the number of CPU threads per operation, for the whole process."""
    torch.set_num_threads(threads)


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Applies each run's adapter; see `loramill.kernels.lora` for the contract."""
    slab.slab.check(batch)
    for run in batch.runs:
        rows, column = x[run.rows], 0
        for module, width in enumerate(slab.site.widths):
            delta = slab.delta(run.slot.index, module)
            if delta is not None:
                target = y[run.rows, column : column + width]
                target.addmm_(rows @ delta.a.to(x.dtype).T, delta.b.to(x.dtype).T)
                if delta.gain is not None:
                    target.mul_(delta.gain)
            column += width


def pack(weight: torch.Tensor) -> Weight:
    """Returns the matrix [d_out, d_in] unchanged."""
    return Weight(weight, weight.dtype, *weight.shape)


def pack_quantized(matrix: Quantized, dtype: torch.dtype) -> Weight:
    """Keeps the codes, indices of levels two per byte; every operation dequantizes them."""
    codes, levels = matrix.codes, matrix.levels
    if levels is not None:
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
        # A byte indexes both of its levels at once.
        levels = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)
    codebook = Codebook(levels, matrix.scales, matrix.group)
    return Weight(codes, dtype, *matrix.codes.shape, codebook=codebook)


def embed(tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The tokens' rows of the matrix, [rows, d_in]."""
    if weight.codebook is None:
        return F.embedding(tokens, weight.data)
    return _values(weight, weight.data[tokens], weight.codebook, weight.codebook.scales[tokens])


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`x @ weight.T`, [rows, d_out]."""
    if weight.codebook is None:
        return F.linear(x, weight.data)
    return F.linear(x, _values(weight, weight.data, weight.codebook, weight.codebook.scales))


def _values(weight: Weight, codes: torch.Tensor, codebook: Codebook, scales: torch.Tensor) -> torch.Tensor:
    """Dequantizes some rows of the matrix."""
    numbers = codes.float() if codebook.levels is None else F.embedding(codes.int(), codebook.levels).flatten(1)
    groups = numbers[:, : weight.d_in].reshape(*scales.shape, codebook.group)
    return (groups * scales[..., None]).flatten(1).to(weight.dtype)


def adapted_linear(x: torch.Tensor, weight: Weight, slab: SiteSlab, batch: Batch) -> torch.Tensor:
    """`linear`, then `lora` on its result."""
    y = linear(x, weight)
    lora(x, y, slab, batch)
    return y


def pack_experts(weights: torch.Tensor) -> Weight:
    """Returns the matrices [experts, d_out, d_in] unchanged."""
    return Weight(weights, weights.dtype, *weights.shape[1:])


def grouped_linear(x: torch.Tensor, weights: Weight, ends: torch.Tensor) -> torch.Tensor:
    """`linear` of each expert for its own rows: one kernel where torch has one, else expert by expert."""
    if has_grouped_kernel(x.device, x.dtype, weights):
        return F.grouped_mm(x, weights.data.mT, offs=ends)
    y = torch.empty(len(x), weights.d_out, dtype=x.dtype, device=x.device)
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            y[start:end] = F.linear(x[start:end], weights.data[expert])
    return y


def has_grouped_kernel(device: torch.device, dtype: torch.dtype, weights: Weight) -> bool:
    """Whether `grouped_linear` is one kernel, which reads `ends` on the device.

    torch has one for compute capabilities 9.x and 10.x, in bfloat16 and for rows of whole 16 bytes (read in its
    GroupedBlas.cpp); elsewhere it copies `offs` to the host and multiplies expert by expert, too.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
        and dtype == torch.bfloat16
        and weights.d_in % 8 == 0
        and weights.d_out % 8 == 0
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Normalizes the last axis of x [..., d]."""
    if offset:
        return F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


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
    return rms_norm(residual.add_(x), weight, eps, offset)


def gated_activation(gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """`activation(gate) * up` for gate_up [rows, 2 d]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)


def new_kv(
    layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[LayerKV, ...]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] per layer, on torch's default device."""
    shape = (layers, blocks, block_size, kv_heads, head_dim)
    # Not filled, hence without pages on the host so far; `attention` ignores what was not written.
    keys, values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
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
    """Rotates queries in place; rotates keys and writes them, and the values, to their pages."""
    pages.check(len(qkv), len(kv.keys), kv.block_size)
    if norms is not None:
        norms.apply(rms_norm, qkv, heads, kv)
    split = qkv.view(len(qkv), heads + 2 * kv.kv_heads, kv.head_dim)
    turned = heads + kv.kv_heads
    first, second = split[:, :turned].chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    split[:, :heads] = rotated[:, :heads]
    slots = pages.on(qkv.device).slots
    kv.keys.flatten(0, 1).index_copy_(0, slots, rotated[:, heads:])
    kv.values.flatten(0, 1).index_copy_(0, slots, split[:, turned:])
