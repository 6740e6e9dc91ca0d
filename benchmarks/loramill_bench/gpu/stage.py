"""What a stage is, and what it gets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from loramill_bench.results import Result

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Where and how a stage runs.

    Attributes:
        dry: whether only the flow is tested: tiny shapes on a CPU.
        folder: for files that a person reads later.
        note: prints and keeps a remark that has no criterion.
    """

    dry: bool
    folder: Path
    note: Callable[[str], object]

    @property
    def device(self) -> str:
        """The device of all tensors."""
        return "cpu" if self.dry else "cuda"

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that a copy within the device's memory reads and writes; infinite for a dry run."""
        from loramill_bench.kernels.cuda import copy_bandwidth

        return float("inf") if self.dry else copy_bandwidth()

    def choose(self, real: T, dry: T) -> T:
        """The value of a real run, or that of a dry one."""
        return dry if self.dry else real

    def synchronize(self) -> None:
        """Waits for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
        """Median wall-clock seconds of a function and what it launches."""
        for _ in range(warm):
            run()
        durations = []
        for _ in range(repeats):
            self.synchronize()
            begun = time.perf_counter()
            run()
            self.synchronize()
            durations.append(time.perf_counter() - begun)
        return statistics.median(durations)

    def kernel_us(self, run: Callable[[], object]) -> float:
        """Median microseconds of what a function launches, in a graph and with a cold L2 cache; of all of it if dry."""
        from loramill_bench.kernels.cuda import median_us

        return 1e6 * self.seconds(run) if self.dry else median_us(run)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most bytes that torch's tensors have during a function; 0 for a dry run."""
        if self.dry:
            run()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run, in a process of its own.

    Attributes:
        name: its cases begin with "gpu" and this name.
        budget: seconds that it should take.
        measure: gives the cases, without targets, as it measures them.
    """

    name: str
    budget: float
    measure: Callable[[Context], Iterator[Result]]
