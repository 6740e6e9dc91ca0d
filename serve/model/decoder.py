"""A decoder for Llama, SmolLM2, Mistral, Qwen2, Qwen3, Qwen3 MoE, Gemma 2 and Gemma 3, by configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loramill.kernels import Backend, Batch, KVSpan, LayerKV, Pages, Site, Slab, Weight
from loramill.kernels.adapters.embedding import batch_of_rows
from loramill.kernels.experts import Experts
from loramill.kernels.layers import Linear, Mlp, Stack, Step, run_layers
from loramill.kernels.memory import to_device
from loramill.kernels.torch_backend import has_grouped_kernel
from loramill.serve.model.config import DecoderConfig
from loramill.serve.model.norms import MergedNorms
from loramill.serve.model.protocol import Chunk, logits_rows
from loramill.serve.model.rope import amplitude, angles, inverse_frequencies


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All tensors of a decoder, in one dtype and the backend's layout.

    Attributes:
        embedding: The token embedding.
        embedding_site: Index of its adapters' site.
        stack: The layers.
        head: The head; its weight is `embedding` if they are tied.
    """

    embedding: Weight
    embedding_site: int
    stack: Stack
    head: Linear


class Decoder:
    """A frozen base model; implements `Model`.

    Attributes:
        config: Shapes and features.
        vocabulary, context_length, dtype, sites: See `Model`.
        device: Of the weights and of each step.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, sites: Sequence[Site], backend: Backend) -> None:
        self.config = config
        self.vocabulary = config.vocabulary
        self.context_length = config.context_length
        self.sites = tuple(sites)
        self.dtype = weights.stack.norm.dtype
        self.device = weights.stack.norm.device
        self._weights = weights
        self._targets = _targets(weights, self.sites)
        self._backend = backend
        self._norms = MergedNorms(self.device)
        self._ropes = [
            (inverse_frequencies(rope, config.head_dim).to(self.device), amplitude(rope))
            for rope in (config.rope, config.local_rope)
            if rope is not None
        ]
        # Rounded to the dtype, as in transformers.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()

    def new_cache(self, blocks: int, block_size: int) -> tuple[LayerKV, ...]:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""
        c = self.config
        with self.device:
            return self._backend.new_kv(c.layers, blocks, block_size, c.kv_heads, c.head_dim, self.dtype)

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; int8 if `bits` is 8."""
        dtype = torch.int8 if bits == 8 else self.dtype
        return Slab(
            self.sites, slots=slots, size=size, dtype=dtype, layout=self._backend.layout, device=str(self.device)
        )

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight of a module, by its name in the checkpoint; None if adapters can't target it."""
        if module not in self._targets:
            return None
        weight, start, width = self._targets[module]
        rows = torch.arange(start, start + width, device=self.device)
        return self._backend.embed(rows, weight).cpu()

    def merged_norms(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Model.merged_norms`."""
        weight, start, _ = self._targets[module]
        return self._norms(lambda rows: self._backend.embed(rows + start, weight), a, b, scale)

    def prepare(self, run_steps: Callable[[], None]) -> None:
        """See `Model.prepare`."""
        run_steps()

    @property
    def failed_captures(self) -> int:
        """See `Model.failed_captures`."""
        return 0

    @property
    def asynchronous(self) -> bool:
        """See `Model.asynchronous`."""
        return self.device.type != "cpu"

    @property
    def capturable(self) -> bool:
        """Whether a step on a GPU runs without reads by the host, so that a graph can replay it."""
        mlps = [layer.mlp for layer in self._weights.stack.layers]
        experts = [weights for mlp in mlps if isinstance(mlp, Experts) for weights in (mlp.gate_up, mlp.down)]
        return all(has_grouped_kernel(self.device, self.dtype, weights) for weights in experts)

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[Chunk],
        cache: Sequence[LayerKV],
        slab: Slab,
        batch: Batch,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one step over the chunks' tokens; see `Model.forward`."""
        x = self.embed(chunks, slab, batch, tokens)
        h = self.layers(x, cache, self.pages(chunks, cache), slab, batch)
        return self.head(h, chunks, slab, batch)

    def pages(self, chunks: Sequence[Chunk], cache: Sequence[LayerKV]) -> Pages:
        """The paging of a step."""
        spans = [KVSpan(start, len(tokens), block_table) for tokens, start, block_table, _ in chunks]
        return Pages.of(spans, cache[0].block_size)

    def embed(
        self, chunks: Sequence[Chunk], slab: Slab, batch: Batch, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The embeddings of the chunks' tokens, or of `tokens` on the device, [rows, hidden]."""
        weights = self._weights
        if tokens is None:
            numbers = np.array([token for chunk in chunks for token in chunk.tokens], np.int64)
            tokens = to_device(numbers, self.device)
        x = self._backend.embed(tokens, weights.embedding)
        if self._embedding_scale != 1.0:
            x.mul_(self._embedding_scale)
        self._backend.adapt_embedding(tokens, x, slab.views[weights.embedding_site], batch, self._embedding_scale)
        return x

    def layers(self, x: torch.Tensor, cache: Sequence[LayerKV], pages: Pages, slab: Slab, batch: Batch) -> torch.Tensor:
        """The normalized states [rows, hidden] after all layers; x [rows, hidden] becomes the residual."""
        positions = pages.on(self.device).positions
        rotation, *local = (angles(positions, *rope) for rope in self._ropes)
        return run_layers(self._backend, self._weights.stack, x, cache, Step(*rotation, pages, slab, batch, *local))

    def head(self, h: torch.Tensor, chunks: Sequence[Chunk], slab: Slab, batch: Batch) -> torch.Tensor:
        """The logits that the chunks need, float32 [logits, vocabulary], of the states [rows, hidden]."""
        head = self._weights.head
        rows: Sequence[int] = range(len(h))
        if sum(chunk.logits_to_keep for chunk in chunks) < len(h):
            rows = logits_rows(chunks)
            h = h[to_device(np.array(rows, np.int64), self.device)]
        view = slab.views[head.site]
        logits = self._backend.adapted_linear(h, head.weight, view, batch_of_rows(batch, rows, view)).float()
        cap = self.config.head_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _targets(weights: DecoderWeights, sites: Sequence[Site]) -> dict[str, tuple[Weight, int, int]]:
    """Where each module's weight is: the matrix into which it was fused, its first row and its number of rows."""
    embedding = sites[weights.embedding_site].modules[0]
    targets = {embedding: (weights.embedding, 0, weights.embedding.d_out)}
    of_layers = [linear for layer in weights.stack.layers for linear in (layer.qkv, layer.o)]
    of_mlps = [
        linear
        for layer in weights.stack.layers
        if isinstance(layer.mlp, Mlp)
        for linear in (layer.mlp.gate_up, layer.mlp.down)
    ]
    for linear in (*of_layers, *of_mlps, weights.head):
        start = 0
        for module, width in zip(sites[linear.site].modules, sites[linear.site].widths, strict=True):
            targets[module] = (linear.weight, start, width)
            start += width
    return targets
