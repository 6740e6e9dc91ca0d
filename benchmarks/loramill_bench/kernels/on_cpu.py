"""The groups of cases on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from loramill.kernels import backend
from loramill.pipelines.compare.timing import Effort
from loramill_bench.kernels import attention, linear, lora
from loramill_bench.kernels.model import Linears, Model
from loramill_bench.results import Result


def groups(model: Model, effort: Effort) -> dict[str, Callable[[], list[Result]]]:
    """The function that measures each group, on one thread. The AVX2 tier is measured if the kernels are native."""
    kernels = backend()
    kernels.set_threads(1)

    @cache
    def linears() -> Linears:
        return Linears.random(kernels, model, torch.bfloat16)

    def measure_mix(mix: lora.Mix, dtype: torch.dtype) -> list[Result]:
        return lora.measure(kernels, linears(), mix, dtype, effort)

    measures: dict[str, Callable[[], list[Result]]] = {
        mix.name(dtype): partial(measure_mix, mix, dtype)
        for dtype in (torch.bfloat16, torch.int8)
        for mix in lora.MIXES
    }
    measures["linear limits"] = lambda: linear.against_limits(kernels, linears(), effort)
    measures["linear against torch"] = lambda: linear.against_torch(kernels, linears(), effort)
    if kernels.name.startswith("cpu"):
        measures["linear fp32 avx2"] = partial(_measure_float, model, effort)
    measures["attention"] = lambda: attention.measure(kernels, model, effort)
    return {name: torch.inference_mode()(measure) for name, measure in measures.items()}


def _measure_float(model: Model, effort: Effort) -> list[Result]:
    from loramill.kernels.cpu.native import open_native

    avx2 = open_native("avx2")
    return linear.against_torch_in_float(avx2, Linears.random(avx2, model, torch.float32), effort)
