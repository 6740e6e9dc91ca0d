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
    """How long the variants of a case are measured against each other.

    Attributes:
        seconds: by the clock, after which no further round begins.
        rounds: at least so many, however long they take.
    """

    seconds: float = 6.0
    rounds: int = 5


#: Bytes that fill the largest cache there is likely to be.
_CACHE = 128 << 20


def interleaved(
    variants: Mapping[str, Callable[[], object]], effort: Effort, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """Median seconds in each variant; a round runs each once, so that all meet the same noise.

    What the first round does is not counted: it warms up. Each variant finds a cache that something else has filled,
    and every second round is in the reverse order: none profits from what runs before it.

    Args:
        variants: what to run.
        effort: how often.
        clock: in seconds; None: the CPU time of this thread.
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
    """What reads `size` bytes (rounded up to 8) from end to end and does next to nothing else."""
    memory = host_memory(-(-size // 8) * 8)
    memory.fill_(1)  # a page that was never written is not read from memory
    return reader(memory)


def reader(memory: torch.Tensor) -> Callable[[], object]:
    """What reads memory, uint8 [a multiple of 8], from end to end and does next to nothing else."""
    words = memory.view(torch.int64)
    return words.sum
