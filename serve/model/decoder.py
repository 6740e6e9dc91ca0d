"""The decoder: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramill.kernels import Backend, Batch, LayerKV, Pages, Site, Slab, Span, Weight
from loramill.kernels.embedding import adapt_embedding, batch_of_rows
from loramill.kernels.layers import Linear, Stack, Step, run_layers
from loramill.serve.model.config import DecoderConfig
from loramill.serve.model.protocol import Chunk, wanted_rows
from loramill.serve.model.rope import amplitude, angles, inverse_frequencies


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a decoder, in one dtype, as the backend laid them out; `head` has `embedding` if they are tied."""

    embedding: Weight
    embedding_site: int
    stack: Stack
    head: Linear


class Decoder:
    """A frozen base model; a `Model`.

    Attributes:
        config: shapes and switches.
        vocabulary, context_length, dtype, sites: as in `Model`.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, sites: Sequence[Site], backend: Backend) -> None:
        self.config = config
        self.vocabulary = config.vocabulary
        self.context_length = config.context_length
        self.sites = tuple(sites)
        self.dtype = weights.stack.norm.dtype
        self._weights = weights
        self._targets = _targets(weights, self.sites)
        self._backend = backend
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._amplitude = amplitude(config.rope)

    def new_cache(self, blocks: int, block_size: int) -> tuple[LayerKV, ...]:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""
        c = self.config
        return self._backend.new_kv(c.layers, blocks, block_size, c.kv_heads, c.head_dim, self.dtype)

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; of int8 if `bits` is 8."""
        dtype = torch.int8 if bits == 8 else self.dtype
        return Slab(self.sites, slots=slots, size=size, dtype=dtype, layout=self._backend.layout)

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight of a module by its name in the checkpoint; None if adapters can't target it."""
        if module not in self._targets:
            return None
        weight, start, width = self._targets[module]
        return self._backend.embed(torch.arange(start, start + width), weight)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], cache: Sequence[LayerKV], slab: Slab, batch: Batch) -> torch.Tensor:
        """Runs one step over the chunks' tokens, as `Model.forward` says."""
        weights, ops = self._weights, self._backend
        spans = [Span(chunk.start, len(chunk.tokens), chunk.blocks) for chunk in chunks]
        pages = Pages.of(spans, cache[0].block_size)
        cos, sin = angles(torch.from_numpy(pages.positions), self._frequencies, self._amplitude)
        tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        x = ops.embed(tokens, weights.embedding)
        adapt_embedding(tokens, x, slab.views[weights.embedding_site], batch)
        h = run_layers(ops, weights.stack, x, cache, Step(cos, sin, pages, slab, batch))
        wanted = wanted_rows(chunks)
        of_head = slab.views[weights.head.site]
        wanted_batch = batch_of_rows(batch, wanted, of_head)
        return ops.adapted_linear(h[wanted], weights.head.weight, of_head, wanted_batch).float()


def _targets(weights: Weights, sites: Sequence[Site]) -> dict[str, tuple[Weight, int, int]]:
    """Where the weight of each module is: the matrix that it was fused into, its first row, and its rows."""
    embedding = sites[weights.embedding_site].modules[0]
    targets = {embedding: (weights.embedding, 0, weights.embedding.d_out)}
    of_layers = [linear for layer in weights.stack.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    for linear in (*of_layers, weights.head):
        start = 0
        for module, width in zip(sites[linear.site].modules, sites[linear.site].widths, strict=True):
            targets[module] = (linear.weight, start, width)
            start += width
    return targets
