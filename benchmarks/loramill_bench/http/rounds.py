"""Alternating runs of the same requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from loramill_bench.http.answers import Run
from loramill_bench.http.workload import Stream

#: Pause between two runs, in which the previous one's processes become idle.
_PAUSE_SECONDS = 0.5

Streams: TypeAlias = tuple[Stream, ...]


def run_in_turns(
    variants: Mapping[str, Callable[[Streams], Run]], streams_of_round: Callable[[int], Streams], rounds: int
) -> dict[str, list[Run]]:
    """Runs all variants once per round; returns the runs of each, without those of the first round, which warms up.

    In each round, all variants get the same requests. Every second round has the reverse order.

    Args:
        variants: Functions that run streams, by name.
        streams_of_round: Returns the streams of a round. No two rounds may have the same prompts, since the second
            would use the first one's prefix cache.
        rounds: Number of rounds after the warm-up.
    """
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        streams = streams_of_round(number)
        for name in list(variants)[:: 1 if number % 2 else -1]:
            time.sleep(_PAUSE_SECONDS)
            run = variants[name](streams)
            if number:
                runs[name].append(run)
    return runs


def median_of(runs: Iterable[Run], figure: Callable[[Run], float]) -> float:
    """The median of a figure over the runs, which ignores a run that another process disturbed."""
    return statistics.median(map(figure, runs))
