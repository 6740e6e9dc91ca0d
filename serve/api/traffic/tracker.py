"""A gateway's sums of what the answers of versions are like, per period. Only the event loop's thread uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set

from loramill.registry.rollouts.traffic import BASELINE_SECONDS, EVERYONE, TrafficKey, period_of
from loramill.types import TrafficCounts

#: Maximum number of periods of versions; 20,000 take about 40 MB: a day of 139 versions that answer all the time, and
#: less of more. The oldest are dropped.
MAX_ENTRIES = 20_000


class TrafficTracker:
    """Sums per version and period of the last day, and which of them are written.

    What came before a version is promoted is what it is compared with, and it is written only then.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sums: dict[TrafficKey, TrafficCounts] = {}
        self._written: dict[TrafficKey, TrafficCounts] = {}

    def add(self, adapter: str, version: str, counts: TrafficCounts) -> None:
        """Adds what one request was like."""
        self.add_copy(adapter, version, counts)
        self.add_copy(*EVERYONE, counts)

    def add_copy(self, adapter: str, version: str, counts: TrafficCounts) -> None:
        """Adds what a copy of a request was like, which takes longer than a request."""
        key = TrafficKey(adapter, version, period_of(self._clock()))
        before = self._sums.get(key)
        self._sums[key] = counts if before is None else before + counts
        if len(self._sums) > MAX_ENTRIES:
            self._remove(next(iter(self._sums)))

    def unwritten(self, needed: Set[tuple[str, str]]) -> dict[TrafficKey, TrafficCounts]:
        """The sums of these adapters and versions that have changed since they were written."""
        return {
            key: counts
            for key, counts in self._sums.items()
            if (key.adapter, key.version) in needed and self._written.get(key) is not counts
        }

    def mark_written(self, written: Mapping[TrafficKey, TrafficCounts]) -> None:
        """Records that sums are in the database."""
        self._written.update((key, counts) for key, counts in written.items() if key in self._sums)

    def forget_old(self) -> None:
        """Removes sums that no rollout that starts now can need."""
        oldest = period_of(self._clock() - BASELINE_SECONDS)
        for key in [key for key in self._sums if key.period < oldest]:
            self._remove(key)

    def _remove(self, key: TrafficKey) -> None:
        del self._sums[key]
        self._written.pop(key, None)
