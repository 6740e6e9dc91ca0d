"""Benchmarks of the kernels: `loramill-bench kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from loramill.errors import SetupError
from loramill.kernels.device import turn_off_cudnn_attention
from loramill.pipelines.compare.timing import Effort
from loramill_bench.kernels import on_cpu, on_cuda
from loramill_bench.kernels.model import SMOLLM2_135M, Model
from loramill_bench.results import Result, run_groups

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
    """Measures this machine's backend; values are medians or ratios of medians, on the CPU of one thread's CPU time.

    On the CPU it takes about three minutes and 3 GB of memory. Afterwards the kernels of this process use one thread.

    Args:
        device: Device whose backend is measured.
        only: Runs only groups of cases whose name contains this.
        report: Called with the name of each group before it runs.
        model: Shapes of the CPU's cases; those of the GPU are fixed.
        effort: Effort per comparison on the CPU.

    Returns:
        One result per case.

    Raises:
        InvalidRequest: No group's name contains `only`.
        SetupError: There is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("torch finds no CUDA device on this machine; use --device cpu, or a machine with a GPU.")
    if device == "cuda":
        turn_off_cudnn_attention()
    groups = on_cuda.groups() if device == "cuda" else on_cpu.groups(model, effort)
    return run_groups(groups, only, report)
