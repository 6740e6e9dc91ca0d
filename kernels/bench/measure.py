"""How a case is measured, and what comes out of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from loramill.errors import InvalidRequest
from loramill.kernels.memory import host_memory


@dataclass(frozen=True, slots=True)
class Result:
    """What one case came to.

    Attributes:
        case: its name; what belongs together begins alike.
        value: medians, or a ratio of medians out of the same rounds.
        unit: of the value, its target and its floor.
        target: what the value must reach; None: the case only informs.
        better: whether low or high values are.
        floor: what the value would be if the bytes in question were only read; None: that makes no sense here.
    """

    case: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    floor: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value reaches the target; None: there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    @property
    def goal(self) -> str:
        """The target with its direction, such as `<= 0.25`; empty: there is none."""
        return "" if self.target is None else f"{'<=' if self.better == 'lower' else '>='} {self.target:g}"


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


def measured(
    groups: Mapping[str, Callable[[], list[Result]]], only: str, report: Callable[[str], object]
) -> list[Result]:
    """The results of the groups whose name contains `only`, each of which is reported before it is measured.

    Raises:
        InvalidRequest: that leaves nothing over.
    """
    chosen = {name: measure for name, measure in groups.items() if only in name}
    if not chosen:
        raise InvalidRequest(f"No case has '{only}' in its name; there are {', '.join(groups)}.", param="only")
    results = []
    for name, measure in chosen.items():
        report(name)
        results += measure()
    return results


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
