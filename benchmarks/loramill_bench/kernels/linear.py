"""The base's linears in a step, compared with reading their weights, with the processor's peak, and with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from loramill.kernels.backend import Backend
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill_bench.kernels.model import Linears, base_step
from loramill_bench.results import Result

#: Numbers of rows for which the native linears must not be slower than torch's.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: The same in float32 with the AVX2 tier.
FLOAT_ROWS = (1, 32, 512)
#: Sizes of the square matrix products of which the fastest may be the processor's peak.
SQUARES = (1024, 1536, 2048)


@dataclass(frozen=True, slots=True)
class Product:
    """A function that multiplies matrices, and its number of floating-point operations."""

    run: Callable[[], object]
    operations: int


def peak_candidates(kernels: Backend, linears: Linears) -> dict[str, Product]:
    """Products of which the fastest is the processor's peak: square ones, and all linears with 32 and with 512 rows."""
    found = {
        f"M={rows}": Product(base_step(kernels, linears, rows), 2 * rows * linears.parameters) for rows in (32, 512)
    }
    for size in SQUARES:
        one, other = (torch.randn(size, size, dtype=linears.matrices[0].dtype) for _ in range(2))
        found[f"mm {size}"] = Product(partial(torch.mm, one, other, out=torch.empty_like(one)), 2 * size**3)
    return found


def peak(products: Mapping[str, Product], spent: Mapping[str, float]) -> float:
    """Operations per second of the fastest product, given the seconds that each has taken."""
    return max(product.operations / spent[name] for name, product in products.items())


def against_limits(kernels: Backend, linears: Linears, effort: Effort) -> list[Result]:
    """Compares one row with a pure read of the weights, and 32 rows with the fastest matrix product."""
    candidates = peak_candidates(kernels, linears)
    variants = {
        "M=1": base_step(kernels, linears, 1),
        **{name: product.run for name, product in candidates.items()},
        "read": pure_read(linears.bytes),
    }
    spent = interleaved(variants, effort)
    fastest = peak(candidates, spent)
    return [
        Result("linear limits: pure read", linears.bytes / spent["read"] / 1e9, "GB/s", better="higher"),
        Result("linear limits: GEMM peak", fastest / 1e9, "GFLOP/s", better="higher"),
        Result("linear limits: M=1", spent["M=1"] / spent["read"], "of pure read", 1.25),
        Result(
            "linear limits: M=32",
            candidates["M=32"].operations / spent["M=32"] / fastest,
            "of GEMM peak",
            0.7,
            "higher",
        ),
    ]


def against_torch(kernels: Backend, linears: Linears, effort: Effort) -> list[Result]:
    """Compares with F.linear and, if it supports bfloat16, with mkldnn on prepacked weights."""
    baselines = [_torch_linear, _mkldnn_linear] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [_torch_linear]
    return _compare(
        "linear against torch", baselines, ROWS, kernels, linears, replace(effort, seconds=effort.seconds / 2)
    )


def against_torch_in_float(kernels: Backend, linears: Linears, effort: Effort) -> list[Result]:
    """Compares the AVX2 tier in float32 with F.linear, which may use all of the processor's instructions."""
    return _compare("linear fp32 avx2", [_torch_linear], FLOAT_ROWS, kernels, linears, effort)


def _compare(
    group: str,
    baselines: Sequence[Callable[[Linears, int], Callable[[], None]]],
    rows: tuple[int, ...],
    kernels: Backend,
    linears: Linears,
    effort: Effort,
) -> list[Result]:
    """The time of the fastest baseline relative to ours for each number of rows, and the lowest of these ratios."""
    ratios: dict[int, float] = {}
    for count in rows:
        theirs = {str(number): baseline(linears, count) for number, baseline in enumerate(baselines)}
        spent = interleaved({"ours": base_step(kernels, linears, count), **theirs}, effort)
        ratios[count] = min(spent[name] for name in theirs) / spent["ours"]
    each = [Result(f"{group}: M={count}", ratio, "x", better="higher") for count, ratio in ratios.items()]
    return [*each, Result(f"{group}: worst M", min(ratios.values()), "x", 1.0, "higher")]


def _torch_linear(linears: Linears, rows: int) -> Callable[[], None]:
    calls = list(zip(linears.inputs(rows), linears.matrices, strict=True))

    def run() -> None:
        for x, matrix in calls:
            F.linear(x, matrix)

    return run


def _mkldnn_linear(linears: Linears, rows: int) -> Callable[[], None]:
    """The linear that torch.compile makes of a frozen one on a CPU, packed for this number of rows."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(matrix, rows) for matrix in linears.matrices]
    calls = list(zip(linears.inputs(rows), packed, strict=True))

    def run() -> None:
        for x, matrix in calls:
            torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")

    return run
