"""What one step runs: the scheduled chunks with their answers, in the order of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loramill.serve.engine.request import RequestState
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk, StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one step runs.

    Attributes:
        plan: The scheduler's decision.
        chunks: Those of the plan, sorted by adapter slot.
        states: The answer of each chunk.
        logits_to_keep: How many of each chunk's last tokens need logits.
        sampled: The answers that get a token, in the order of their chunks.
    """

    plan: StepPlan
    chunks: list[ScheduledChunk]
    states: list[RequestState]
    logits_to_keep: list[int]
    sampled: list[RequestState]

    @classmethod
    def of(cls, plan: StepPlan, pairs: Sequence[tuple[RequestState, ScheduledChunk]]) -> StepBatch:
        """The batch of a plan's chunks and their answers, sorted by adapter slot."""
        return cls(
            plan,
            [chunk for _, chunk in pairs],
            [state for state, _ in pairs],
            [state.logits_to_keep(chunk) for state, chunk in pairs],
            [state for state, chunk in pairs if chunk.sampled],
        )

    def part(self, indices: Sequence[int]) -> StepBatch:
        """The batch of some of the chunks; the scheduler schedules the others again."""
        pairs = [(self.states[index], self.chunks[index]) for index in indices]
        return StepBatch.of(replace(self.plan, chunks=tuple(chunk for _, chunk in pairs)), pairs)
