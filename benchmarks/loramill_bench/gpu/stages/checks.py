"""The stages checks and kernels: whether the Triton kernels are right, and their time compared with reading bytes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from loramill_bench.gpu.stage import Context
from loramill_bench.kernels import cuda, cuda_attention, cuda_training, rivals
from loramill_bench.results import Result

_MODULES = ("cuda", "cuda_attention", "cuda_decoder", "cuda_training")
_DTYPES = ("bfloat16", "float16", "float32")
#: Seconds after which a process that checks is ended.
_TIMEOUT = 150.0
_CODE = """
import json, torch
from loramill_bench.kernels import {module}
rows = [[c.error / c.limit, f"{{c.site}} {{c.runs}}"] for c in {module}.check(dtypes=[torch.{dtype}])]
print(json.dumps(rows))
"""
_CASES = (cuda.Case(8, 8, 16), cuda.Case(32, 32, 16), cuda.Case(128, 128, 16), cuda.Case(512, 4, 16))


def check(context: Context) -> Iterator[Result]:
    """The kernels against their references in float32: called, called again without a wait, and replayed.

    Each module and dtype has a process of its own, since compiling takes most of the time; the later stages find what
    they compiled in Triton's cache.
    """
    if context.dry:
        return
    begun = time.monotonic()
    cases = [(module, dtype) for module in _MODULES for dtype in _DTYPES]
    # They share the cores: the references would otherwise run on as many threads each.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(cases)))}
    running = {
        f"{module} {dtype}": subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE.format(module=module, dtype=dtype)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for module, dtype in cases
    }
    for name, process in running.items():
        try:
            printed, _ = process.communicate(timeout=max(1.0, _TIMEOUT - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            printed = ""
        yield _worst(context, name, printed)
    yield Result("gpu checks: duration with compiling", time.monotonic() - begun, "s")


def _worst(context: Context, name: str, printed: str) -> Result:
    """The worst of a process's errors in units of its limit; infinite if the process failed."""
    case = f"gpu checks {name}: worst error"
    lines = printed.strip().splitlines()
    if not lines:
        context.note(f"{name}: the process failed or took longer than {_TIMEOUT:g} s")
        return Result(case, math.inf, "of the limit")
    rows = [(math.inf if math.isnan(ratio) else ratio, what) for ratio, what in json.loads(lines[-1])]
    ratio, what = max(rows)
    context.note(f"{name}: worst at {what}")
    return Result(case, ratio, "of the limit")


def time_kernels(context: Context) -> Iterator[Result]:
    """The time of adapters, of decode attention and of training's fused layers, and of copying their bytes."""
    if context.dry:
        return
    for case in _CASES:
        for timing in cuda.timings([case]):
            name = f"{case.rows}/{case.adapters}/{case.rank} {timing.site}"
            us = timing.us if timing.graph_us is None else timing.graph_us
            yield Result(f"gpu kernels lora {name}", us, "us", floor=timing.floor_us)
            yield Result(f"gpu kernels against gather + bmm, {name}", timing.gather_us / us, "x")
            yield Result(f"gpu kernels: base, {name}", timing.linear_us, "us")
    for attention in cuda_attention.CASES:
        found = cuda_attention.timing(attention)
        yield Result(f"gpu kernels attention {attention}", found.us, "us", floor=found.floor_us)
        yield Result(f"gpu kernels against gather + sdpa, {attention}", found.gather_us / found.us, "x")
    for layer in cuda_training.CASES:
        timed = cuda_training.timing(layer)
        yield Result(f"gpu kernels training {layer}", timed.us, "us", floor=timed.floor_us)
        yield Result(f"gpu kernels against transformers, {layer}", timed.unfused_us / timed.us, "x")
    yield from compare_with_rivals()


def compare_with_rivals() -> Iterator[Result]:
    """Adapters against the operators of vLLM and SGLang, where installed; NaN where they could not be compared.

    Last in the stage: their imports and compilations take longest, and a failure can break the GPU's context.
    """
    for each in rivals.comparisons(_CASES):
        step = f"{each.case.rows}/{each.case.adapters}/{each.case.rank} {each.site}"
        yield Result(f"gpu kernels against {each.rival}, {step}{each.remark}", each.us / each.ours_us, "x")
