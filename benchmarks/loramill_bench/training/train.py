"""What training and the queue reach on this machine: `loramill-bench train`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loramill.models.catalog import Base
from loramill_bench.measure import Result, measured
from loramill_bench.training import memory, queue, speed

__all__ = ["RIVALS", "run"]

#: Packages that training is measured against.
RIVALS = ("transformers", "peft")


def run(
    base: Base, only: str = "", report: Callable[[str], object] = lambda group: None, *, rounds: int = 8
) -> list[Result]:
    """Measures jobs on a base in bfloat16: ratios within one process, medians, one thread and its CPU time.

    With SmolLM2-135M that takes some fifteen minutes and 3 GB; what sizing foretells and the queue are measured, too.

    Args:
        base: that is trained on; transformers and PEFT load it, too.
        only: groups of cases whose name contains this; a case's name begins with its group's.
        report: is told the name of each group before it is measured.
        rounds: of a comparison, besides the one that warms up.

    Returns:
        A result a case.

    Raises:
        InvalidRequest: `only` leaves nothing over.
    """
    groups = {case: partial(speed.measure, base, case, rounds) for case in speed.CASES}
    others = {"queue": partial(queue.results, report), "memory": partial(memory.results, report)}
    return measured({**groups, **others}, only, report)
