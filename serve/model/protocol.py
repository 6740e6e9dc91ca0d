"""The engine's interface to a base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from loramill.kernels import Batch, LayerKV, Site, Slab


class Chunk(NamedTuple):
    """Tokens of one sequence that the model computes in one step. A tuple, since a step makes one per sequence.

    Attributes:
        tokens: The new tokens, at least one.
        start: Position of the first of them; all positions before it are in the cache.
        block_table: The sequence's blocks in order, enough for `start + len(tokens)` positions.
        logits_to_keep: How many of the last tokens need logits.
    """

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    logits_to_keep: int


class Model(Protocol):
    """A frozen base with a paged KV cache and adapters at its sites.

    Attributes:
        sites: Where adapters apply; `forward` takes a slab over exactly these.
    """

    sites: tuple[Site, ...]

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary: number of columns of the logits."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations, and of adapters in a slab that is not int8."""

    def prepare(self, run_steps: Callable[[], None]) -> None:
        """Runs a model's first steps, so that later ones like them compile and capture nothing.

        Args:
            run_steps: Calls `forward` for each; may be called more than once.
        """

    @property
    def failed_captures(self) -> int:
        """Number of graphs that could not be captured; steps of their sizes are launched kernel by kernel."""

    @property
    def asynchronous(self) -> bool:
        """Whether `forward` returns before its result is computed, as on a GPU."""

    def new_cache(self, blocks: int, block_size: int) -> Sequence[LayerKV]:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; int8 if `bits` is 8."""

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight of a module, by its name in the checkpoint; None if adapters can't target it.

        It is [d_out, d_in] for a linear, [vocabulary, hidden] for an embedding, in the dtype in which it is used. For
        `<module>.bias`, a head's bias [d_out] if it has one.
        """

    def merged_norms(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """The norms of the rows of a module's weight plus `scale * b @ a`, float32 [d_out] on the host, for DoRA.

        Any thread may call it; on a GPU no step waits for it.

        Args:
            module: A linear that adapters can target.
            a: [r, d_in].
            b: [d_out, r].
            scale: Factor of their product.
        """

    def forward(
        self,
        chunks: Sequence[Chunk],
        cache: Sequence[LayerKV],
        slab: Slab,
        batch: Batch,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one step over the chunks' tokens, in order.

        Args:
            chunks: At least one.
            cache: From `new_cache`; gets the new keys and values.
            slab: The adapters.
            batch: The adapter of each row; there is one row per token.
            tokens: int64 [rows] on the model's device, in place of the chunks' tokens.

        Returns:
            float32 logits [sum of the chunks' `logits_to_keep`, vocabulary], in the order of the rows.
        """


def logits_rows(chunks: Sequence[Chunk]) -> list[int]:
    """The rows of a step that need logits, in order."""
    rows: list[int] = []
    stop = 0
    for chunk in chunks:
        stop += len(chunk.tokens)
        rows += range(stop - chunk.logits_to_keep, stop)
    return rows
