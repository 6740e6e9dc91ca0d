"""The decoder: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loramill.kernels import Batch, Site, Slab, lora
from loramill.serve.model.config import DecoderConfig
from loramill.serve.model.kv import AttentionPlan, Chunk, KVCache
from loramill.serve.model.rope import angles, inverse_frequencies, rotate


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear, or several fused by rows: weight [d_out, d_in], bias [d_out] or None, and its adapters' site."""

    weight: torch.Tensor
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
    """All tensors of a decoder, in one dtype; `head` is `embedding` where they are tied."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor


class Decoder:
    """A frozen base model.

    Attributes:
        config: shapes and switches.
        dtype: of weights and activations.
        sites: where adapters act; `forward` wants a slab over exactly these.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, sites: Sequence[Site]) -> None:
        self.config = config
        self.sites = tuple(sites)
        self.dtype = weights.embedding.dtype
        self._weights = weights
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)

    def new_cache(self, blocks: int, block_size: int) -> KVCache:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""
        return KVCache(self.config, blocks, block_size, self.dtype)

    def new_slab(self, slots: int) -> Slab:
        """An empty slab of `slots` adapters for `forward`."""
        return Slab(self.sites, slots)

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight [d_out, d_in] of a module by its name in the checkpoint; None if adapters can't target it."""
        for index, site in enumerate(self.sites):
            if module in site.modules:
                layer = self._weights.layers[index // 4]
                fused = (layer.qkv, layer.o, layer.gate_up, layer.down)[index % 4].weight
                return torch.split(fused, list(site.widths))[site.modules.index(module)]
        return None

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], cache: KVCache, slab: Slab, batch: Batch) -> torch.Tensor:
        """Runs one step over the chunks' tokens, in order.

        Args:
            chunks: at least one.
            cache: of `new_cache`; gets the new keys and values.
            slab: the adapters.
            batch: whose rows are whose; a row a token.

        Returns:
            float32 logits [sampled chunks, vocabulary].
        """
        weights, c = self._weights, self.config
        positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
        turns = angles(positions, self._frequencies, self.dtype)
        step = _Step(turns, cache, cache.plan(chunks), slab, batch)
        x = F.embedding(torch.tensor([token for chunk in chunks for token in chunk.tokens]), weights.embedding)
        for index, layer in enumerate(weights.layers):
            h = F.rms_norm(x, (c.hidden,), layer.input_norm, c.norm_eps)
            x = x + self._attention(index, layer, h, step)
            h = F.rms_norm(x, (c.hidden,), layer.post_norm, c.norm_eps)
            gate, up = step.linear(h, layer.gate_up).chunk(2, dim=-1)
            x = x + step.linear(F.silu(gate) * up, layer.down)
        x = F.rms_norm(x[_sampled_rows(chunks)], (c.hidden,), weights.norm, c.norm_eps)
        return F.linear(x, weights.head).float()

    def _attention(self, index: int, layer: Layer, h: torch.Tensor, step: _Step) -> torch.Tensor:
        c = self.config
        heads = step.linear(h, layer.qkv).view(len(h), -1, c.head_dim)
        q, k, v = torch.split(heads, [c.heads, c.kv_heads, c.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, (c.head_dim,), layer.q_norm, c.norm_eps)
            k = F.rms_norm(k, (c.head_dim,), layer.k_norm, c.norm_eps)
        out = step.cache.attend(index, rotate(q, *step.turns), rotate(k, *step.turns), v, step.plan)
        return step.linear(out, layer.o)


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share."""

    turns: tuple[torch.Tensor, torch.Tensor]
    cache: KVCache
    plan: AttentionPlan
    slab: Slab
    batch: Batch

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        y = F.linear(x, linear.weight)
        lora(x, y, self.slab.views[linear.site], self.batch)
        # After the adapter: DoRA's gain doesn't scale the bias.
        return y if linear.bias is None else y + linear.bias


def _sampled_rows(chunks: Sequence[Chunk]) -> torch.Tensor:
    rows: list[int] = []
    stop = 0
    for chunk in chunks:
        stop += len(chunk.tokens)
        if chunk.sampled:
            rows.append(stop - 1)
    return torch.tensor(rows, dtype=torch.long)
