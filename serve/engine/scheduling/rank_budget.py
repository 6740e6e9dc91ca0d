"""Which versions may run together, given a budget for the ranks of their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loramill.serve.engine.scheduling.sequence import RunningSequence

#: Steps that the rank budget may keep a sequence waiting before no other version may start ahead of it.
_PATIENCE_STEPS = 64


class RankBudget:
    """Admits versions whose ranks, with those of the running versions, sum to at most a limit; one always may run.

    A sequence that has been kept waiting for too many steps becomes the starved one: until it starts, no other version
    may.
    """

    def __init__(self, limit: int | None, rank_of: Callable[[str], int]) -> None:
        """
        Args:
            limit: Largest sum of the ranks; None: no limit.
            rank_of: The rank of a version that may run.
        """
        self._limit = limit
        self._rank_of = rank_of
        self._starved: RunningSequence | None = None
        self._steps = 0

    def begin_step(self, ready: Callable[[str | None], bool]) -> None:
        """Starts a step; `ready` is as in `Scheduler.schedule`."""
        self._steps += 1
        if self._starved is not None and not ready(self._starved.version):
            # Its version waits for a slot, and the versions that it would keep waiting may have all of them.
            self._starved = None

    def admits(self, sequence: RunningSequence, running: Iterable[RunningSequence]) -> bool:
        """Whether a waiting sequence may start next to the running ones; records since when it may not."""
        if sequence.version is None or self._has_rank_for(sequence.version, running):
            return True
        if sequence.rank_blocked_since is None:
            sequence.rank_blocked_since = self._steps
        elif self._starved is None and self._steps - sequence.rank_blocked_since > _PATIENCE_STEPS:
            self._starved = sequence
        return False

    def forget(self, sequence: RunningSequence) -> None:
        """Ends a sequence's wait: it has started or was removed."""
        sequence.rank_blocked_since = None
        if sequence is self._starved:
            self._starved = None

    def _has_rank_for(self, version: str, running: Iterable[RunningSequence]) -> bool:
        if self._limit is None:
            return True
        if self._starved is not None and self._starved.version != version:
            return False
        others = {s.version for s in running if s.version is not None}
        if version in others or not others:
            return True
        return sum(map(self._rank_of, others)) + self._rank_of(version) <= self._limit
