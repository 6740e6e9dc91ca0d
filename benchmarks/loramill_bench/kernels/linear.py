"""The base's linears of a step, against reading their weights, the processor's peak and torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from loramill.kernels.backend import Backend
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill_bench.kernels.model import Linears, base_step
from loramill_bench.measure import Result

#: Rows at which the native linears must not lose.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: The same for the AVX2 tier in float32.
FLOAT_ROWS = (1, 32, 512)
#: Sizes of the square products among which torch's fastest is looked for.
SQUARES = (1024, 1536, 2048)


@dataclass(frozen=True, slots=True)
class Product:
    """Something that multiplies matrices, and its floating-point operations."""

    run: Callable[[], object]
    operations: int


def products(kernels: Backend, linears: Linears) -> dict[str, Product]:
    """Among what the processor's peak is looked for: square products, and all linears with 32 and with 512 rows."""
    found = {
        f"M={rows}": Product(base_step(kernels, linears, rows), 2 * rows * linears.parameters) for rows in (32, 512)
    }
    for size in SQUARES:
        one, other = (torch.randn(size, size, dtype=linears.matrices[0].dtype) for _ in range(2))
        found[f"mm {size}"] = Product(partial(torch.mm, one, other, out=torch.empty_like(one)), 2 * size**3)
    return found


def peak(products: Mapping[str, Product], spent: Mapping[str, float]) -> float:
    """Operations a second of the fastest, by the seconds that each has taken."""
    return max(product.operations / spent[name] for name, product in products.items())


def against_limits(kernels: Backend, linears: Linears, effort: Effort) -> list[Result]:
    """Few rows against the pure read of the weights, 32 against the fastest product that was seen here."""
    rivals = products(kernels, linears)
    variants = {
        "M=1": base_step(kernels, linears, 1),
        **{name: product.run for name, product in rivals.items()},
        "read": pure_read(linears.bytes),
    }
    spent = interleaved(variants, effort)
    fastest = peak(rivals, spent)
    return [
        Result("linear limits: pure read", linears.bytes / spent["read"] / 1e9, "GB/s", better="higher"),
        Result("linear limits: GEMM peak", fastest / 1e9, "GFLOP/s", better="higher"),
        Result("linear limits: M=1", spent["M=1"] / spent["read"], "of pure read", 1.25),
        Result(
            "linear limits: M=32", rivals["M=32"].operations / spent["M=32"] / fastest, "of GEMM peak", 0.7, "higher"
        ),
    ]


def against_torch(kernels: Backend, linears: Linears, effort: Effort) -> list[Result]:
    """Never slower than F.linear, nor than mkldnn on prepacked weights where that knows bfloat16."""
    rivals = [_plain, _prepacked] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [_plain]
    return _against("linear against torch", rivals, ROWS, kernels, linears, replace(effort, seconds=effort.seconds / 2))


def against_torch_in_float(kernels: Backend, linears: Linears, effort: Effort) -> list[Result]:
    """The AVX2 tier in float32: at least as fast as F.linear, which may use all that the processor has."""
    return _against("linear fp32 avx2", [_plain], FLOAT_ROWS, kernels, linears, effort)


def _against(
    group: str,
    rivals: Sequence[Callable[[Linears, int], Callable[[], None]]],
    rows: tuple[int, ...],
    kernels: Backend,
    linears: Linears,
    effort: Effort,
) -> list[Result]:
    """How many times slower the fastest rival is at each number of rows, and at the worst of them."""
    ratios: dict[int, float] = {}
    for count in rows:
        theirs = {str(number): rival(linears, count) for number, rival in enumerate(rivals)}
        spent = interleaved({"ours": base_step(kernels, linears, count), **theirs}, effort)
        ratios[count] = min(spent[name] for name in theirs) / spent["ours"]
    each = [Result(f"{group}: M={count}", ratio, "x", better="higher") for count, ratio in ratios.items()]
    return [*each, Result(f"{group}: worst M", min(ratios.values()), "x", 1.0, "higher")]


def _plain(linears: Linears, rows: int) -> Callable[[], None]:
    calls = list(zip(linears.inputs(rows), linears.matrices, strict=True))

    def run() -> None:
        for x, matrix in calls:
            F.linear(x, matrix)

    return run


def _prepacked(linears: Linears, rows: int) -> Callable[[], None]:
    """What torch.compile makes of a frozen linear on a CPU: laid out for this number of rows."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(matrix, rows) for matrix in linears.matrices]
    calls = list(zip(linears.inputs(rows), packed, strict=True))

    def run() -> None:
        for x, matrix in calls:
            torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")

    return run
