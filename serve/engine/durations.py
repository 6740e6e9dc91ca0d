"""How long things took, as numbers that only grow."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

#: Seconds, each the most that a thing counted under it took; what took longer than the last is counted behind it.
BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class Durations:
    """A look at a `Stopwatch`: `counts` by `BOUNDS`, one more for the longest, and all `seconds` together."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_SECONDS) + 1)
    total_seconds: float = 0.0


class DurationHistogram:
    """Counts durations since the start."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        """One more thing took so long."""
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self._seconds += seconds

    @property
    def durations(self) -> Durations:
        """All of them so far."""
        return Durations(tuple(self._counts), self._seconds)
