"""The decoder: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramill.kernels import Backend, Batch, LayerKV, Pages, Site, Slab, Span, Weight
from loramill.serve.model.config import DecoderConfig
from loramill.serve.model.rope import angles, inverse_frequencies


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that pass the decoder in this step.

    Attributes:
        tokens: the new ones, at least one.
        start: position of the first of them; all before it are in the cache.
        blocks: the sequence's blocks in order, enough for `start + len(tokens)` positions.
        wanted: of how many of its last tokens the logits are wanted.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wanted: int


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear, or several fused by rows: its weight, bias [d_out] or None, and its adapters' site."""

    weight: Weight
    bias: torch.Tensor | None
    site: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One block; the q and k norms are Qwen3's."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a decoder, in one dtype, as the backend laid them out; `head` is `embedding` if they are tied."""

    embedding: Weight
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Weight


class Decoder:
    """A frozen base model.

    Attributes:
        config: shapes and switches.
        dtype: of weights and activations.
        sites: where adapters act; `forward` wants a slab over exactly these.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, sites: Sequence[Site], backend: Backend) -> None:
        self.config = config
        self.sites = tuple(sites)
        self.dtype = weights.norm.dtype
        self._weights = weights
        self._backend = backend
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)

    def new_cache(self, blocks: int, block_size: int) -> tuple[LayerKV, ...]:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""
        c = self.config
        return self._backend.new_kv(c.layers, blocks, block_size, c.kv_heads, c.head_dim, self.dtype)

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; of int8 if `bits` is 8."""
        dtype = torch.int8 if bits == 8 else self.dtype
        return Slab(self.sites, slots=slots, size=size, dtype=dtype, layout=self._backend.layout)

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight [d_out, d_in] of a module by its name in the checkpoint; None if adapters can't target it."""
        for index, site in enumerate(self.sites):
            if module in site.modules:
                layer = self._weights.layers[index // 4]
                fused = (layer.qkv, layer.o, layer.gate_up, layer.down)[index % 4].weight
                part = site.modules.index(module)
                start = sum(site.widths[:part])
                return self._backend.embed(torch.arange(start, start + site.widths[part]), fused)
        return None

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], cache: Sequence[LayerKV], slab: Slab, batch: Batch) -> torch.Tensor:
        """Runs one step over the chunks' tokens, in order.

        Args:
            chunks: at least one.
            cache: of `new_cache`; gets the new keys and values.
            slab: the adapters.
            batch: whose rows are whose; a row a token.

        Returns:
            float32 logits [wanted of all chunks, vocabulary], in the order of the rows.
        """
        weights, c, ops = self._weights, self.config, self._backend
        spans = [Span(chunk.start, len(chunk.tokens), chunk.blocks) for chunk in chunks]
        pages = Pages.of(spans, cache[0].block_size)
        step = _Step(ops, *angles(torch.from_numpy(pages.positions), self._frequencies), pages, slab, batch)
        x = ops.embed(torch.tensor([token for chunk in chunks for token in chunk.tokens]), weights.embedding)
        h = ops.rms_norm(x, weights.layers[0].input_norm, c.norm_eps)
        next_norms = [*(layer.input_norm for layer in weights.layers[1:]), weights.norm]
        for layer, kv, next_norm in zip(weights.layers, cache, next_norms, strict=True):
            h = ops.add_rms_norm(x, self._attention(layer, h, kv, step), layer.post_norm, c.norm_eps)
            h = step.linear(ops.silu_mul(step.linear(h, layer.gate_up)), layer.down)
            h = ops.add_rms_norm(x, h, next_norm, c.norm_eps)
        return ops.linear(h[_wanted_rows(chunks)], weights.head).float()

    def _attention(self, layer: Layer, h: torch.Tensor, kv: LayerKV, step: _Step) -> torch.Tensor:
        c, ops = self.config, self._backend
        qkv = step.linear(h, layer.qkv)
        if layer.q_norm is not None and layer.k_norm is not None:
            heads = qkv.view(len(qkv), -1, c.head_dim)
            q, k = heads[:, : c.heads], heads[:, c.heads : c.heads + c.kv_heads]
            q.copy_(ops.rms_norm(q, layer.q_norm, c.norm_eps))
            k.copy_(ops.rms_norm(k, layer.k_norm, c.norm_eps))
        ops.rope_write(qkv, c.heads, step.cos, step.sin, kv, step.pages)
        return step.linear(ops.attention(qkv, c.heads, kv, step.pages, c.head_dim**-0.5), layer.o)


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share."""

    ops: Backend
    cos: torch.Tensor
    sin: torch.Tensor
    pages: Pages
    slab: Slab
    batch: Batch

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        y = self.ops.adapted_linear(x, linear.weight, self.slab.views[linear.site], self.batch)
        # After the adapter: DoRA's gain doesn't scale the bias.
        return y if linear.bias is None else y.add_(linear.bias)


def _wanted_rows(chunks: Sequence[Chunk]) -> torch.Tensor:
    rows: list[int] = []
    stop = 0
    for chunk in chunks:
        stop += len(chunk.tokens)
        rows += range(stop - chunk.wanted, stop)
    return torch.tensor(rows, dtype=torch.long)
