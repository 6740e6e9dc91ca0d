"""What the engine needs of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loramill.kernels import Batch, LayerKV, Site, Slab


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that pass the model in this step.

    Attributes:
        tokens: the new ones, at least one.
        start: position of the first of them; all before it are in the cache.
        blocks: the sequence's blocks in order, enough for `start + len(tokens)` positions.
        wanted: of how many of its last tokens the logits are wanted.
    """

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    logits_to_keep: int


class Model(Protocol):
    """A frozen base over paged KV, with adapters at its sites.

    Attributes:
        sites: where adapters act; `forward` wants a slab over exactly these.
    """

    sites: tuple[Site, ...]

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows: columns of the logits."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of adapters in a slab that isn't int8."""

    def new_cache(self, blocks: int, block_size: int) -> Sequence[LayerKV]:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; of int8 if `bits` is 8."""

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight of a module by its name in the checkpoint; None if adapters can't target it.

        [d_out, d_in] of a linear, [vocabulary, hidden] of an embedding, in the dtype in which it is used. A head's bias
        [d_out], if it has one, by `<module>.bias`.
        """

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


def logits_rows(chunks: Sequence[Chunk]) -> list[int]:
    """The rows of a step whose logits are wanted, in order."""
    rows: list[int] = []
    stop = 0
    for chunk in chunks:
        stop += len(chunk.tokens)
        rows += range(stop - chunk.logits_to_keep, stop)
    return rows
