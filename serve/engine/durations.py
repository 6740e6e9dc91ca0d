"""Histograms of durations, as numbers that only grow."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

#: Upper bounds of the buckets in seconds; longer durations are counted in one more bucket.
BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class Durations:
    """A snapshot of a `DurationHistogram`.

    Attributes:
        counts: Durations per bucket of `BOUNDS_SECONDS`, and the longer ones last.
        total_seconds: Sum of all durations.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_SECONDS) + 1)
    total_seconds: float = 0.0


class DurationHistogram:
    """Counts durations since the start."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self._total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration."""
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self._total_seconds += seconds

    @property
    def durations(self) -> Durations:
        """All durations so far."""
        return Durations(tuple(self._counts), self._total_seconds)
