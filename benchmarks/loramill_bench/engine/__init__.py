"""Benchmarks of the engine, compared with other engines and with the limits of the machine: `loramill-bench engine`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from loramill.models.catalog import Base
from loramill.serve.model import load_decoder
from loramill_bench.engine import cold_adapters, continuous_batching, host_time, idle, limits, peft, prefill, zipf
from loramill_bench.engine.harness import Harness, write_adapters
from loramill_bench.results import Result, run_groups

__all__ = ["BASELINES", "run"]

#: Packages that the engine is compared with.
BASELINES = ("transformers", "peft")
#: Number of adapters on disk. If a case has more versions, some share their files; to the engine they are different.
_ADAPTERS = 32


def run(
    base: Base, only: str = "", report: Callable[[str], object] = lambda group: None, *, rounds: int = 24
) -> list[Result]:
    """Measures the engine over a base in bfloat16, on one thread; values are medians of CPU time, or ratios of them.

    With SmolLM2-135M it takes about eight minutes, 3 GB of memory, and 0.4 GB of temporary files. Afterwards the
    kernels of this process use one thread.

    Args:
        base: The served base; transformers and PEFT load it too.
        only: Runs only groups of cases whose name contains this.
        report: Called with the name of each group before it runs.
        rounds: Rounds per comparison; slow cases run fewer rounds and precise ones more.

    Returns:
        One result per case.

    Raises:
        InvalidRequest: No group's name contains `only`.
        BaseUnusable: The base can't be served.
    """
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as scratch:
        decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
        harness = Harness(base, decoder, write_adapters(decoder, Path(scratch), _ADAPTERS))
        return run_groups(_groups(harness, rounds), only, report)


def _groups(harness: Harness, rounds: int) -> Mapping[str, Callable[[], list[Result]]]:
    modules = (peft, continuous_batching, limits, idle, host_time, zipf, cold_adapters, prefill)
    cases = [(module, case) for module in modules for case in module.CASES]
    return {case.name: partial(module.measure, harness, case, rounds) for module, case in cases}
