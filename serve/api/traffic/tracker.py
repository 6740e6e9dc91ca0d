"""A gateway's sums of what the answers of versions are like, per minute. Only the event loop's thread uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set

from loramill.registry.rollouts.traffic import TrafficKey, minute_of
from loramill.types import TrafficCounts

#: Seconds for which sums are kept. What came before a version is promoted is what it is compared with, and it is
#: written only then.
KEPT_SECONDS = 3600.0
#: Maximum number of minutes of versions; 20,000 take about 40 MB.
MAX_ENTRIES = 20_000


class TrafficTracker:
    """Sums per version and minute of the last hour, and which of them are written."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sums: dict[TrafficKey, TrafficCounts] = {}
        self._written: dict[TrafficKey, TrafficCounts] = {}

    def add(self, adapter: str, version: str, counts: TrafficCounts) -> None:
        """Adds what one request was like."""
        key = TrafficKey(adapter, version, minute_of(self._clock()))
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
        oldest = self._clock() - KEPT_SECONDS
        for key in [key for key in self._sums if key.minute < oldest]:
            self._remove(key)

    def _remove(self, key: TrafficKey) -> None:
        del self._sums[key]
        self._written.pop(key, None)
