"""The groups of cases on a GPU: correctness of the Triton kernels in each dtype, and the time of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from loramill_bench.kernels import cuda, cuda_attention, cuda_decoder, cuda_training, rivals
from loramill_bench.results import Result


def groups() -> dict[str, Callable[[], list[Result]]]:
    """The function that measures each group."""
    measures: dict[str, Callable[[], list[Result]]] = {}
    checks = {"": cuda, "attention ": cuda_attention, "decoder ": cuda_decoder, "training ": cuda_training}
    for kind, source in checks.items():
        for dtype in cuda.LIMITS:
            name = f"cuda {kind}check {str(dtype).removeprefix('torch.')}"
            measures[name] = partial(_check_results, name, source, dtype)
    measures |= {_case_name(case): partial(_lora_results, case) for case in cuda.CASES}
    measures |= {f"cuda attention {case}": partial(_attention_results, case) for case in cuda_attention.CASES}
    return measures | {f"cuda training {case}": partial(_training_results, case) for case in cuda_training.CASES}


def _case_name(case: cuda.Case) -> str:
    return f"cuda {case.rows}/{case.adapters}/{case.rank}"


def _check_results(name: str, source: ModuleType, dtype: torch.dtype) -> list[Result]:
    worst = max(source.check(dtypes=[dtype]), key=lambda each: math.inf if math.isnan(each.error) else each.error)
    return [Result(f"{name}: worst error", worst.error, "of the largest value", worst.limit)]


def _lora_results(case: cuda.Case) -> list[Result]:
    results = []
    floor_us = {}
    for timing in cuda.timings([case]):
        floor_us[timing.site] = timing.floor_us
        contenders = {
            "lora": timing.us,
            "lora in a graph for any batch": timing.graph_us,
            "lora in one launch": timing.fused_us,
            "gather + bmm": timing.gather_us,
            "base": timing.linear_us,
        }
        results += [
            Result(
                f"{_case_name(case)} {timing.site}: {name}", us, "us", floor=None if name == "base" else timing.floor_us
            )
            for name, us in contenders.items()
            if us is not None
        ]
    results += [
        Result(f"{_case_name(case)} {each.site}: {each.rival}{each.remark}", each.us, "us", floor=floor_us[each.site])
        for each in rivals.comparisons([case])
    ]
    return results


def _attention_results(case: cuda_attention.Case) -> list[Result]:
    timing = cuda_attention.timing(case)
    name = f"cuda attention {case}"
    return [
        Result(f"{name}: decode", timing.us, "us", floor=timing.floor_us),
        Result(f"{name}: gather + sdpa", timing.gather_us, "us", floor=timing.floor_us),
    ]


def _training_results(case: cuda_training.Case) -> list[Result]:
    timing = cuda_training.timing(case)
    return [
        Result(f"cuda training {case}: fused", timing.us, "us", floor=timing.floor_us),
        Result(f"cuda training {case}: by transformers", timing.unfused_us, "us", floor=timing.floor_us),
    ]
