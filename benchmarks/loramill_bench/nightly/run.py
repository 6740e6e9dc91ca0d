"""The groups of `loramill-bench nightly`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loramill_bench.nightly import gate
from loramill_bench.results import Result, run_groups


def run(only: str = "", report: Callable[[str], object] = lambda group: None) -> list[Result]:
    """Measures the nightly run.

    Args:
        only: Runs only groups whose name contains this.
        report: Called with the name of each group before it runs.

    Raises:
        InvalidRequest: No group's name contains `only`.
    """
    groups = {f"gate {metric}": partial(gate.results, metric) for metric in ("exact_match", "token_f1")}
    return run_groups(groups, only, report)
