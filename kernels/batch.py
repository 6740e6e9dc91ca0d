"""The adapter of each row of a step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A handle to a slot of a slab; it becomes stale when the slot is freed, which increments the generation."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent rows with the same adapter."""

    slot: Slot
    rows: slice


@dataclass(frozen=True)
class Batch:
    """The rows of one step, built once and used by every layer.

    Attributes:
        rows: Number of rows of x and y.
        runs: Runs with an adapter, in the order of their rows; all other rows use the base alone.
        memo: Values that backends and slabs compute once for all layers, by keys of their own.
    """

    rows: int
    runs: tuple[Run, ...]
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, counts: Iterable[tuple[Slot | None, int]]) -> Batch:
        """Builds a batch from pairs (slot, or None for the base; number of rows), joining adjacent equal slots."""
        rows = start = 0
        runs: list[Run] = []
        last: Slot | None = None
        for slot, count in counts:
            if count and slot is not last and slot != last:
                if last is not None:
                    runs.append(Run(last, slice(start, rows)))
                last, start = slot, rows
            rows += count
        if last is not None:
            runs.append(Run(last, slice(start, rows)))
        return cls(rows, tuple(runs))

    @cached_property
    def rows_of_slots(self) -> dict[Slot, tuple[slice, ...]]:
        """The rows of each slot, in the order of the slots' first rows."""
        rows: dict[Slot, tuple[slice, ...]] = {}
        for run in self.runs:
            rows[run.slot] = (*rows.get(run.slot, ()), run.rows)
        return rows

    @cached_property
    def segments(self) -> NDArray[np.int32]:
        """The runs as int32 [runs, 3]: slot index, first row, row after the last."""
        numbers = [(run.slot.index, run.rows.start, run.rows.stop) for run in self.runs]
        return np.array(numbers, dtype=np.int32).reshape(-1, 3)
