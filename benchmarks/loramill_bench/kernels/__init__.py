"""What the kernels reach on this machine: `loramill-bench kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from loramill.errors import SetupError
from loramill.pipelines.compare.timing import Effort
from loramill_bench.kernels import on_cpu, on_cuda
from loramill_bench.kernels.model import SMOLLM2_135M, Model
from loramill_bench.measure import Result, measured

__all__ = ["Device", "Effort", "Model", "Result", "run"]

Device = Literal["cpu", "cuda"]


def run(
    device: Device = "cpu",
    only: str = "",
    report: Callable[[str], object] = lambda group: None,
    *,
    model: Model = SMOLLM2_135M,
    effort: Effort = Effort(),  # noqa: B008 - frozen
) -> list[Result]:
    """Measures this machine's backend: ratios within one process, medians; on the CPU one thread and its CPU time.

    That takes some three minutes and 3 GB on the CPU, and leaves the process with one thread for the kernels.

    Args:
        device: whose backend.
        only: groups of cases whose name contains this; a case's name begins with its group's.
        report: is told the name of each group before it is measured.
        model: whose shapes; the GPU's are its own.
        effort: for each comparison on the CPU.

    Returns:
        A result a case.

    Raises:
        InvalidRequest: `only` leaves nothing over.
        SetupError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("torch finds no CUDA device on this machine; measure the CPU, or run this where there is one.")
    groups = on_cuda.groups() if device == "cuda" else on_cpu.groups(model, effort)
    return measured(groups, only, report)
