"""Runs of the same work that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from loramill_bench.http.answers import Run
from loramill_bench.http.work import Stream

#: Seconds in which what ran before comes to rest.
_REST = 0.5

Streams: TypeAlias = tuple[Stream, ...]


def alternated(
    variants: Mapping[str, Callable[[Streams], Run]], draw: Callable[[int], Streams], rounds: int
) -> dict[str, list[Run]]:
    """The runs of each variant, a round each; a first one warms up and isn't among them.

    All variants get the work of a round, and every second round is in the reverse order. No two rounds have the same
    prompts: they would be in the cache.

    Args:
        variants: what runs.
        draw: the work of a round.
        rounds: that count.
    """
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        streams = draw(number)
        for name in list(variants)[:: 1 if number % 2 else -1]:
            time.sleep(_REST)
            run = variants[name](streams)
            if number:
                runs[name].append(run)
    return runs


def typical(runs: Iterable[Run], what: Callable[[Run], float]) -> float:
    """The median of the runs' figures: one that something else on the machine hit doesn't count."""
    return statistics.median(map(what, runs))
