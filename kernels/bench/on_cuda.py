"""The GPU's groups of cases, by name: whether the Triton kernels are right in each dtype, and what each step takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from loramill.kernels.bench import cuda
from loramill.kernels.bench.measure import Result


def groups() -> dict[str, Callable[[], list[Result]]]:
    """What measures each group."""
    checks = {f"cuda check {str(dtype).removeprefix('torch.')}": partial(_checked, dtype) for dtype in cuda.LIMITS}
    return {**checks, **{_name(case): partial(_timed, case) for case in cuda.CASES}}


def _name(case: cuda.Case) -> str:
    return f"cuda {case.rows}/{case.adapters}/{case.rank}"


def _checked(dtype: torch.dtype) -> list[Result]:
    worst = max(cuda.check(dtypes=[dtype]), key=lambda each: math.inf if math.isnan(each.error) else each.error)
    name = str(dtype).removeprefix("torch.")
    return [Result(f"cuda check {name}: worst error", worst.error, "of the largest value", worst.limit)]


def _timed(case: cuda.Case) -> list[Result]:
    results = []
    for timing in cuda.timings([case]):
        contenders = {
            "lora": timing.us,
            "lora in a graph for any batch": timing.graph_us,
            "lora in one launch": timing.fused_us,
            "gather + bmm": timing.gather_us,
            "vLLM's Punica": timing.punica_us,
            "base": timing.linear_us,
        }
        results += [
            Result(f"{_name(case)} {timing.site}: {name}", us, "us", floor=None if name == "base" else timing.floor_us)
            for name, us in contenders.items()
            if us is not None
        ]
    return results
