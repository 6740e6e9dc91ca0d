"""Replays decode steps from CUDA graphs: launching a step's kernels one by one takes longer than running them.

A graph repeats launches with the same tensors and grids, so there is one per number of rows and largest rank, for a few
values of each. A step uses the smallest graph that it fits; unused rows write to a block that no sequence has.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from loramill.kernels import Batch, LayerKV, Pages, Site, Slab
from loramill.kernels.adapter import RANK
from loramill.serve.model.decoder import Decoder
from loramill.serve.model.protocol import Chunk

#: Numbers of rows of the graphs.
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Largest ranks of the graphs; a graph of rank 0 has no adapter kernels.
RANKS = (0, 16, 64, 256)

#: Captures what a function launches; the result launches it again and returns the same tensor.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


class GraphPlan(Protocol):
    """The adapter of each row, in buffers of fixed size; see `loramill.kernels.triton.StaticPlan`."""

    batch: Batch

    def refresh(self, batch: Batch) -> None:
        """Replaces the content by that of a batch."""


class GraphPages(Protocol):
    """The paging of a step, in buffers of fixed size; see `loramill.kernels.triton.StaticPages`."""

    pages: Pages

    def refresh(self, pages: Pages) -> None:
        """Replaces the content by that of a paging."""


class GraphBuffers(Protocol):
    """A backend's support for graphs; `loramill.kernels.triton` implements it."""

    @property
    def StaticPlan(self) -> Callable[..., GraphPlan]:  # noqa: N802
        """Constructor of a plan: (slab, rows=, rank=)."""

    @property
    def StaticPages(self) -> Callable[..., GraphPages]:  # noqa: N802
        """Constructor of a paging: (rows=, blocks=, block_size=, scratch=, device=)."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step with a fixed number of rows.

    Attributes:
        x: [rows, hidden]: the embedded tokens; a replay overwrites them.
        pages: The paging.
        plan: The adapters; None for a graph without adapters.
        replay: Returns the hidden states [rows, hidden], always in the same memory.
    """

    x: torch.Tensor
    pages: GraphPages
    plan: GraphPlan | None
    replay: Callable[[], torch.Tensor]


class GraphedDecoder:
    """A decoder on a GPU whose decode steps are replayed from graphs; implements `Model`.

    Steps with tokens of a prompt, with more rows or with larger ranks than any graph run without a graph. A graph is
    captured when the first step needs it, which takes as long as several steps, and is valid for one cache and one
    slab: with another cache or slab, all graphs are dropped.

    Attributes:
        vocabulary, context_length, dtype, sites: See `Model`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: Sequence[int] = ROWS,
        ranks: Sequence[int] = RANKS,
        capture: Capture | None = None,
        buffers: GraphBuffers | None = None,
    ) -> None:
        """
        Args:
            decoder: With its weights on the GPU.
            rows: Numbers of rows of the graphs, ascending.
            ranks: Largest ranks of the graphs, ascending.
            capture: Captures a function; None: into a CUDA graph.
            buffers: The decoder's backend; None: Triton.
        """
        if buffers is None:
            from loramill.kernels import triton

            buffers = triton
        self.vocabulary = decoder.vocabulary
        self.context_length = decoder.context_length
        self.dtype = decoder.dtype
        self.sites: tuple[Site, ...] = decoder.sites
        self._decoder = decoder
        self._rows, self._ranks = tuple(rows), tuple(ranks)
        self._capture = capture or CudaCapture()
        self._buffers = buffers
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._owners: tuple[Sequence[LayerKV], Slab] | None = None
        # The largest rank in each slot, and the slab and its number of changes for which they were computed.
        self._slot_ranks = np.zeros(0, np.int64)
        self._ranked: Callable[[], Slab | None] = lambda: None
        self._ranked_changes = -1

    def new_cache(self, blocks: int, block_size: int) -> tuple[LayerKV, ...]:
        """An empty KV cache of `blocks` blocks for `forward`, and one more for unused rows of a graph."""
        self._drop()
        return self._decoder.new_cache(blocks + 1, block_size)

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; int8 if `bits` is 8."""
        return self._decoder.new_slab(slots, size, bits)

    def target_weight(self, module: str) -> torch.Tensor | None:
        """See `Model.target_weight`."""
        return self._decoder.target_weight(module)

    def merged_norms(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Model.merged_norms`."""
        return self._decoder.merged_norms(module, a, b, scale)

    @property
    def asynchronous(self) -> bool:
        """See `Model.asynchronous`."""
        return self._decoder.asynchronous

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[Chunk],
        cache: Sequence[LayerKV],
        slab: Slab,
        batch: Batch,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one step over the chunks' tokens, with a cache from `new_cache`; see `Model.forward`."""
        bucket = self._bucket(chunks, slab, batch)
        if bucket is None:
            return self._decoder.forward(chunks, cache, slab, batch, tokens)
        if self._owners is None or self._owners[0] is not cache or self._owners[1] is not slab:
            self._drop()
            self._owners = cache, slab
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(*bucket, cache, slab)
        graph, count = self._graphs[bucket], len(chunks)
        graph.pages.refresh(self._decoder.pages(chunks, cache))
        if graph.plan is not None:
            graph.plan.refresh(batch)
        # The other rows keep the last replay's values: no row depends on another.
        graph.x[:count] = self._decoder.embed(chunks, slab, batch, tokens)
        return self._decoder.head(graph.replay()[:count], chunks, slab, batch)

    def _bucket(self, chunks: Sequence[Chunk], slab: Slab, batch: Batch) -> tuple[int, int] | None:
        """Rows and largest rank of the smallest graph that a step fits; None if it fits none."""
        if any(len(chunk.tokens) != 1 or chunk.logits_to_keep != 1 for chunk in chunks):
            return None
        rows = bisect_left(self._rows, len(chunks))
        rank = bisect_left(self._ranks, self._largest_rank(slab, batch))
        if rows == len(self._rows) or rank == len(self._ranks):
            return None
        return self._rows[rows], self._ranks[rank]

    def _largest_rank(self, slab: Slab, batch: Batch) -> int:
        if (self._ranked(), self._ranked_changes) != (slab, slab.changes):
            self._ranked, self._ranked_changes = weakref.ref(slab), slab.changes
            self._slot_ranks = slab.table[..., RANK].max(axis=(0, 2), initial=0)
        return int(self._slot_ranks[batch.segments[:, 0]].max(initial=0))

    def _record(self, rows: int, rank: int, cache: Sequence[LayerKV], slab: Slab) -> _Graph:
        decoder, block_size = self._decoder, cache[0].block_size
        pages = self._buffers.StaticPages(
            rows=rows,
            blocks=rows * -(-self.context_length // block_size),
            block_size=block_size,
            scratch=len(cache[0].keys) - 1,
            device=decoder.device,
        )
        plan = self._buffers.StaticPlan(slab, rows=rows, rank=rank) if rank else None
        batch = Batch(rows, ()) if plan is None else plan.batch
        x = torch.zeros(rows, decoder.config.hidden, dtype=self.dtype, device=decoder.device)
        return _Graph(x, pages, plan, self._capture(lambda: decoder.layers(x, cache, pages.pages, slab, batch)))

    def _drop(self) -> None:
        self._graphs.clear()
        self._owners = None


class CudaCapture:
    """Captures CUDA graphs that share a memory pool: no graph is replayed while another's result is needed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Runs the function once on a side stream, so that its kernels are compiled, and captures it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads load adapters meanwhile; their calls must not affect the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
