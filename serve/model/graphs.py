"""Replays decode steps from CUDA graphs: launching a step's kernels one by one takes longer than running them.

A graph repeats launches with the same tensors and grids, so there is one per number of rows and largest rank, for a few
values of each. A step uses the smallest graph that it fits; unused rows write to a block that no sequence has.

Steps with prompts have no graphs: those would need a paged attention of our own for prompts, and graphs for numbers of
tokens as well. By a model of Llama 3 8B on an H100, the host launches the 22 kernels per layer of such a step in 10 to
15 ms (14 without adapters, in 5 to 7 ms), and the GPU computes 32 decodes and a prompt for 10 ms (200 tokens) or 17 ms
(500 tokens). A graph would save at most 5 ms of such a step: 5% where one step in ten has a prompt, and nothing where
prompts are long.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from loramill.kernels import Batch, LayerKV, Pages, Site, Slab
from loramill.kernels.adapters.packing import RANK
from loramill.kernels.device import device_works, free_cached_memory
from loramill.serve.model.decoder import Decoder
from loramill.serve.model.protocol import Chunk

log = logging.getLogger(__name__)

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

    def parallel_compilation(self) -> AbstractContextManager[None]:
        """Compiles kernels in other threads instead of launching them; at the end of the block, all are compiled."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A step with a fixed number of rows.

    Attributes:
        x: [rows, hidden]: the embedded tokens; a run overwrites them.
        pages: The paging.
        plan: The adapters; None for a graph without adapters.
        run: Returns the hidden states [rows, hidden]; once captured, always in the same memory.
    """

    x: torch.Tensor
    pages: GraphPages
    plan: GraphPlan | None
    run: Callable[[], torch.Tensor]


class GraphedDecoder:
    """A decoder on a GPU whose decode steps are replayed from graphs; implements `Model`.

    Steps with tokens of a prompt, with more rows or with larger ranks than any graph run without a graph; so do those
    whose graph can't be captured. A graph is captured when the first step needs it, which takes as long as several
    steps, and is valid for one cache and one slab: with another cache or slab, all graphs are dropped.

    Attributes:
        vocabulary, context_length, dtype, sites, failed_captures: See `Model`.
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
        # By numbers of rows and ranks; None: the graph can't be captured.
        self._graphs: dict[tuple[int, int], _Graph | None] = {}
        self.failed_captures = 0
        self._compiling = False
        self._owners: tuple[Sequence[LayerKV], Slab] | None = None

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

    def prepare(self, run_steps: Callable[[], None]) -> None:
        """See `Model.prepare`: kernels are compiled in parallel, then graphs are captured."""
        with self._buffers.parallel_compilation():
            self._compiling = True
            try:
                run_steps()
            finally:
                self._compiling = False
        run_steps()

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
        graph = None if bucket is None else self._graph(*bucket, cache, slab)
        if graph is None:
            return self._decoder.forward(chunks, cache, slab, batch, tokens)
        count = len(chunks)
        graph.pages.refresh(self._decoder.pages(chunks, cache))
        if graph.plan is not None:
            graph.plan.refresh(batch)
        # The other rows keep the last replay's values: no row depends on another.
        graph.x[:count] = self._decoder.embed(chunks, slab, batch, tokens)
        return self._decoder.head(graph.run()[:count], chunks, slab, batch)

    def _bucket(self, chunks: Sequence[Chunk], slab: Slab, batch: Batch) -> tuple[int, int] | None:
        """Rows and largest rank of the smallest graph that a step fits; None if it fits none."""
        if batch.rows > len(chunks) or not all(chunk.logits_to_keep for chunk in chunks):
            return None
        rows = bisect_left(self._rows, len(chunks))
        rank = bisect_left(self._ranks, self._largest_rank(slab, batch))
        if rows == len(self._rows) or rank == len(self._ranks):
            return None
        return self._rows[rows], self._ranks[rank]

    def _largest_rank(self, slab: Slab, batch: Batch) -> int:
        known: tuple[int, int] | None = batch.memo.get((GraphedDecoder, slab))
        if known is None or known[0] != slab.changes:
            rank = int(slab.table[:, batch.segments[:, 0], :, RANK].max(initial=0))
            known = batch.memo[GraphedDecoder, slab] = slab.changes, rank
        return known[1]

    def _graph(self, rows: int, rank: int, cache: Sequence[LayerKV], slab: Slab) -> _Graph | None:
        """The captured graph; None if it can't be captured, or only its kernels are to be compiled."""
        if self._owners is None or self._owners[0] is not cache or self._owners[1] is not slab:
            self._drop()
            self._owners = cache, slab
        if self._compiling:
            self._step(rows, rank, cache, slab).run()
            return None
        if (rows, rank) not in self._graphs:
            self._graphs[rows, rank] = self._captured(rows, rank, cache, slab)
        return self._graphs[rows, rank]

    def _captured(self, rows: int, rank: int, cache: Sequence[LayerKV], slab: Slab) -> _Graph | None:
        device = self._decoder.device
        try:
            step = self._step(rows, rank, cache, slab)
            return replace(step, run=self._capture(step.run))
        except Exception:
            if not device_works(device):
                raise
            self.failed_captures += 1
            log.warning("no CUDA graph for decodes of %d rows and rank %d: capture failed", rows, rank, exc_info=True)
        free_cached_memory(device)
        return None

    def _step(self, rows: int, rank: int, cache: Sequence[LayerKV], slab: Slab) -> _Graph:
        """A step in buffers of its own, before it is captured."""
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
        return _Graph(x, pages, plan, lambda: decoder.layers(x, cache, pages.pages, slab, batch))

    def _drop(self) -> None:
        self._graphs.clear()
        self._owners = None


class CudaCapture:
    """Captures CUDA graphs that share a memory pool: no graph is replayed while another's result is needed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all captures: torch has 32, and after as many requests hands out those of other threads again.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Runs the function once on a side stream, so that its kernels are compiled, and captures it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads load adapters meanwhile; their calls must not affect the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            self._leave_pool()
            raise
        finally:
            # After an error, `torch.cuda.graph` may leave its own stream as the current one (2.13).
            torch.cuda.set_stream(current)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def _leave_pool(self) -> None:
        """Takes another pool after a capture that failed.

        Where CUDA can't end a capture, torch continues to allocate for it (2.13, `CUDAGraph::capture_end`) and refuses
        all later captures into its pool.
        """
        with suppress(RuntimeError):  # torch has ended it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()
