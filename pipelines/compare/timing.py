"""Times variants against each other within one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from loramill.kernels.memory import host_memory


@dataclass(frozen=True, slots=True)
class Effort:
    """How long variants are measured against each other.

    Attributes:
        seconds: wall time after which no further round begins.
        rounds: minimum number of rounds.
    """

    seconds: float = 6.0
    rounds: int = 5


#: Bytes that fill any CPU cache.
_CACHE = 128 << 20


def interleaved(
    variants: Mapping[str, Callable[[], object]], effort: Effort, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """Median seconds per variant; each round runs each variant once, so that all are exposed to the same noise.

    The first round is not counted: it warms up. Before each variant the cache is filled with other data, and every
    second round has the reverse order, so that no variant profits from the previous one.

    Args:
        variants: functions by name.
        effort: number of rounds.
        clock: returns seconds; default: CPU time of this thread.
    """
    clock = clock or time.thread_time
    refill = pure_read(_CACHE)
    spent: dict[str, list[float]] = {name: [] for name in variants}
    end = time.monotonic() + effort.seconds
    done = -1
    while done < effort.rounds or time.monotonic() < end:
        for name in list(variants)[:: 1 if done % 2 else -1]:
            refill()
            began = clock()
            variants[name]()
            spent[name].append(clock() - began)
        done += 1
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def pure_read(size: int) -> Callable[[], object]:
    """A function that reads `size` bytes (rounded up to 8) and does little else."""
    memory = host_memory(-(-size // 8) * 8)
    memory.fill_(1)  # a page that was never written is not read from memory
    return reader(memory)


def reader(memory: torch.Tensor) -> Callable[[], object]:
    """A function that reads a memory, uint8 [a multiple of 8], and does little else."""
    words = memory.view(torch.int64)
    return words.sum
