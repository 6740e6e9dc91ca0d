"""Benchmarks of serving over HTTP, compared with vLLM and with the engine called directly: `loramill-bench serve`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from loramill.models.catalog import Base
from loramill.settings import Settings
from loramill_bench.http import gateway, overload, promotion, throughput
from loramill_bench.http.servers import vllm_version
from loramill_bench.http.testbed import Testbed
from loramill_bench.results import Result, run_groups

__all__ = ["run", "vllm_version"]


def run(
    base: Base,
    only: str = "",
    report: Callable[[str], object] = lambda group: None,
    *,
    vllm: Path | None = None,
    seed: int = 0,
    rounds: int = 3,
) -> list[Result]:
    """Starts its own `loramill up` and measures it with prompts of 64 tokens and answers of 64, in wall-clock time.

    The client and the server share all cores. With SmolLM2-135M on two cores, the benchmark takes about ten minutes, or
    half an hour with vLLM, 8 GB of memory, and 1 GB of temporary files.

    Args:
        base: The served base, in bfloat16; vLLM serves it too.
        only: Runs only groups of cases whose name contains this.
        report: Called with the name of each group before it runs.
        vllm: Python interpreter of an environment with vLLM; None skips vLLM.
        seed: Seed of adapters and requests.
        rounds: Rounds per comparison, after one warm-up round.

    Returns:
        One result per case.

    Raises:
        InvalidRequest: No group's name contains `only`.
        SetupError: A server does not start.
        EngineFault: Requests failed in a case in which none may fail.
    """
    with (
        tempfile.TemporaryDirectory(prefix="loramill-bench-") as folder,
        Testbed(base, Settings.load(), Path(folder), vllm, seed) as testbed,
    ):
        return run_groups(_groups(testbed, rounds), only, report)


def _groups(testbed: Testbed, rounds: int) -> Mapping[str, Callable[[], list[Result]]]:
    return {
        **{case.name: partial(throughput.measure, testbed, case, rounds) for case in throughput.CASES},
        "gateway first token": partial(gateway.measure_first_token, testbed, rounds),
        "gateway 32": partial(gateway.measure_throughput, testbed, rounds),
        "promote 32": partial(promotion.measure, testbed, rounds),
        "overload": partial(overload.measure, testbed, rounds),
    }
