"""Which rows of a step belong to which adapter."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True)
class Batch:
    """The rows of one step, built once and used by every layer.

    Attributes:
        rows: rows of x and y.
        runs: the runs that have an adapter, in the order of their rows; all other rows are the base's alone.
        memo: what backends and slabs work out once for all layers, by a key of theirs.
    """

    rows: int
    runs: tuple[Run, ...]
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    @cached_property
    def segments(self) -> NDArray[np.int32]:
        """The runs as int32 [runs, 3]: index of the slot, first row, row after the last."""
        numbers = [(run.slot.index, run.rows.start, run.rows.stop) for run in self.runs]
        return np.array(numbers, dtype=np.int32).reshape(-1, 3)
