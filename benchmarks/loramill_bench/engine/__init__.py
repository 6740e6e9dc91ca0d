"""What the engine reaches on this machine, against others and against the machine's limits: `loramill-bench engine`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from loramill.models.catalog import Base
from loramill.serve.model import load_decoder
from loramill_bench.engine import cold, idle, limits, peft, prefill, runs, zipf
from loramill_bench.engine.subject import Subject, write_adapters
from loramill_bench.measure import Result, measured

__all__ = ["RIVALS", "run"]

#: Packages that the engine is measured against.
RIVALS = ("transformers", "peft")
#: Different adapters; more versions than that share their files, and are their own versions to the engine.
_FOLDERS = 32


def run(
    base: Base, only: str = "", report: Callable[[str], object] = lambda group: None, *, rounds: int = 24
) -> list[Result]:
    """Measures the engine over a base in bfloat16: ratios within one process, medians, one thread and its CPU time.

    With SmolLM2-135M that takes some eight minutes, 3 GB and, while it runs, 0.4 GB of temporary files; it leaves the
    process with one thread for the kernels.

    Args:
        base: that is served; transformers and PEFT load it, too.
        only: groups of cases whose name contains this; a case's name begins with its group's.
        report: is told the name of each group before it is measured.
        rounds: of a comparison; a slow one gets fewer, a fine one more.

    Returns:
        A result a case.

    Raises:
        InvalidRequest: `only` leaves nothing over.
        BaseUnusable: the base can't be served.
    """
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as scratch:
        decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
        subject = Subject(base, decoder, write_adapters(decoder, Path(scratch), _FOLDERS))
        return measured(_groups(subject, rounds), only, report)


def _groups(subject: Subject, rounds: int) -> Mapping[str, Callable[[], list[Result]]]:
    modules = (peft, runs, limits, idle, zipf, cold, prefill)
    cases = [(module, case) for module in modules for case in module.CASES]
    return {case.name: partial(module.measure, subject, case, rounds) for module, case in cases}
