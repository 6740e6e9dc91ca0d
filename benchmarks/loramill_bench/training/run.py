"""Benchmarks of training and of the job queue: `loramill-bench train`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loramill.models.catalog import Base
from loramill_bench.results import Result, run_groups
from loramill_bench.training import memory, queue, session_memory, shared_steps, small_jobs, throughput

__all__ = ["BASELINES", "run"]

#: Packages that training is compared with.
BASELINES = ("transformers", "peft")


def run(
    base: Base, only: str = "", report: Callable[[str], object] = lambda group: None, *, rounds: int = 8
) -> list[Result]:
    """Measures training throughput, the job queue, and the error of memory estimates, on one thread in CPU time.

    With SmolLM2-135M it takes about an hour and 3 GB of memory.

    Args:
        base: The trained base, in bfloat16; transformers and PEFT load it too.
        only: Runs only groups of cases whose name contains this.
        report: Called with the name of each group before it runs.
        rounds: Rounds per comparison, after one warm-up round.

    Returns:
        One result per case.

    Raises:
        InvalidRequest: No group's name contains `only`.
    """
    groups = {case: partial(throughput.measure, base, case, rounds) for case in throughput.CASES}
    groups |= {case.name: partial(shared_steps.measure, base, case, rounds) for case in shared_steps.CASES}
    others = {
        "queue": partial(queue.results, report),
        "memory": partial(memory.results, report),
        "session memory": partial(session_memory.results, report),
        "small jobs": partial(small_jobs.results, report),
    }
    return run_groups({**groups, **others}, only, report)
