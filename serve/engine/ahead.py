"""Decodes that were launched before the tokens of the step before them were read.

A GPU would wait while the host reads a step's tokens, puts them out and schedules the next step. So the next pass over
the model is launched for all answers that will probably continue, with tokens that are still on the device, and only
then the host waits for them. The next step is scheduled from the tokens that were read, as always, and takes from the
pass the logits of the chunks that are scheduled as they were computed. Others are not used: an answer has ended, or
has lost its blocks. What they wrote to the KV cache is never read: steps that the device runs later write to their
blocks first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loramill.kernels.memory import to_device
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk
from loramill.serve.engine.scheduling.sequence import RunningSequence
from loramill.serve.model import Chunk


class PendingTokens:
    """Tokens on their way from the device, int64 [rows]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.device.type != "cuda":
            self._tokens = tokens.clone()
            return
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._tokens.copy_(tokens, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[int | None]:
        """Waits for the tokens, and for nothing that was launched after them; None where one is negative."""
        if self._event is not None:
            self._event.synchronize()
        return [None if token < 0 else token for token in self._tokens.tolist()]


@dataclass(frozen=True, slots=True)
class AheadPass:
    """A pass that was launched ahead.

    Attributes:
        decodes: The row of the logits and the chunk that was computed, by the sequence's id. A sequence that loses its
            blocks gets another block table than the chunk's.
        logits: float32 [rows, vocabulary].
    """

    decodes: dict[int, tuple[int, Chunk]]
    logits: torch.Tensor

    def row(self, chunk: ScheduledChunk, sequence: RunningSequence) -> int | None:
        """The row of a chunk's logits; None if the pass did not compute the chunk."""
        row, computed = self.decodes.get(chunk.id, (None, None))
        if computed is None or chunk.count != 1 or chunk.start != computed.start:
            return None
        return row if sequence.block_table is computed.block_table else None

    def merge(self, rows: Sequence[int | None], kept: Sequence[int], rest: torch.Tensor | None) -> torch.Tensor:
        """The logits of a step.

        Args:
            rows: The row of each chunk; None where the pass did not compute it.
            kept: How many rows of logits each chunk needs.
            rest: The logits of the chunks that the pass did not compute; None if there are none.
        """
        if rest is None and list(rows) == list(range(len(self.logits))):
            return self.logits
        both = self.logits if rest is None else torch.cat([self.logits, rest])
        order, next_row = list[int](), len(self.logits)
        for row, count in zip(rows, kept, strict=True):
            order += range(next_row, next_row + count) if row is None else [row]
            next_row += count if row is None else 0
        return both[to_device(np.array(order, np.int64), both.device)]
