"""Which rows of a step belong to which adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A handle to a place in a slab; stale once the place is freed, since the next owner's has another generation."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent rows of one adapter."""

    slot: Slot
    rows: slice


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, built once and used by every layer.

    Attributes:
        rows: rows of x and y.
        runs: the runs that have an adapter, in the order of their rows; all other rows are the base's alone.
    """

    rows: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, counts: Iterable[tuple[Slot | None, int]]) -> Batch:
        """Builds the batch from (slot, or None for the base; number of rows), joining neighbours of equal slot."""
        rows = 0
        runs: list[Run] = []
        for slot, count in counts:
            start, rows = rows, rows + count
            if slot is None or count == 0:
                continue
            if runs and runs[-1].slot == slot and runs[-1].rows.stop == start:
                start = runs.pop().rows.start
            runs.append(Run(slot, slice(start, rows)))
        return cls(rows, tuple(runs))
