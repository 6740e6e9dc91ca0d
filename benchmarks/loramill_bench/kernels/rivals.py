"""The adapter operators of vLLM and SGLang, where these are installed, timed on the steps that time our own.

Their interfaces change between versions. Operators that are missing, take other arguments or compute something else are
reported with the reason, without a time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import torch

from loramill.kernels.adapters.packing import Site
from loramill_bench.kernels.cuda import (
    CASES,
    GRAPH_ROWS,
    LLAMA_3_8B,
    Case,
    Problem,
    gather_bmm,
    lora_launches,
    median_us,
    name,
    random_problem,
    static_launches,
)

#: Largest difference from the result of torch, relative to the largest value: a few roundings to bfloat16 cause 0.01,
#: and an operator that reads another matrix or overwrites y is off by more than 0.1.
_SAME = 0.05
#: The operators of SGLang 0.5.23 (October 2026), whose interfaces the functions below use; older versions have them
#: elsewhere. The optional backend `triton_v2`, which allocates and routes by itself, is not compared.
_SGLANG = "sglang.kernels.ops.lora.dense"
#: Default rows of a chunk in SGLang's backend `csgmv`.
_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Comparison:
    """The time of a rival's operators for one step at one site.

    Attributes:
        rival: A name in `RIVALS`.
        site: Modules and dimensions.
        case: The step.
        us: Time of the rival's operators in microseconds; NaN: they could not be compared.
        ours_us: Time of `lora`, in a graph for any batch if the step has at most `GRAPH_ROWS` rows.
        failure: Why they could not be compared; None: they were.
    """

    rival: str
    site: str
    case: Case
    us: float
    ours_us: float
    failure: str | None

    @property
    def remark(self) -> str:
        """The end of a row's name: empty, or the failure, such as ` (not compared: ImportError: …)`."""
        return "" if self.failure is None else f" (not compared: {self.failure})"


def comparisons(
    cases: Iterable[Case] = CASES,
    sites: Iterable[Site] = LLAMA_3_8B,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str = "cuda",
    time_us: Callable[[Callable[[], object]], float] = median_us,
) -> Iterator[Comparison]:
    """Times the operators of every installed rival, and ours, for every case at every site."""
    installed = {rival: prepare for rival, (package, prepare) in RIVALS.items() if _is_installed(package)}
    if not installed:
        return
    for case, site in product(tuple(cases), tuple(sites)):
        problem = random_problem(site, case, dtype, device)
        ours = static_launches(problem) if case.rows <= GRAPH_ROWS else lora_launches(problem)
        ours_us = time_us(ours)
        for rival, prepare in installed.items():
            us, failure = _time(prepare, problem, time_us)
            yield Comparison(rival, name(site), case, us, ours_us, failure)


def versions() -> list[str]:
    """The installed rivals with their versions, such as `sglang 0.5.23`."""
    packages = {package for package, _ in RIVALS.values() if _is_installed(package)}
    if not packages:
        return []
    distributions = importlib.metadata.packages_distributions()
    names = sorted({each for package in packages for each in distributions.get(package, ())})
    return [f"{each} {importlib.metadata.version(each)}" for each in names]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _time(
    prepare: Callable[[Problem], Callable[[], None]],
    problem: Problem,
    time_us: Callable[[Callable[[], object]], float],
) -> tuple[float, str | None]:
    """The time of the function that `prepare` returns, and None; or NaN, and why it has no time."""
    try:
        run = prepare(problem)
        difference = _difference(run, problem)
        if not difference <= _SAME:
            return math.nan, f"the result differs from torch's by {difference:.2g} of the largest value"
        return time_us(run), None
    except Exception as error:  # noqa: BLE001 - another project's code may raise anything
        return math.nan, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def _difference(run: Callable[[], None], problem: Problem) -> float:
    """The largest difference between what `run` and torch add to y, relative to the largest value."""
    results = []
    for contend in (run, lambda: gather_bmm(problem)):
        problem.y.fill_(1.0)
        contend()
        results.append(problem.y.to(torch.float32, copy=True))
    got, expected = results
    return ((got - expected).abs().max() / expected.abs().max()).item()


def vllm_punica(problem: Problem) -> Callable[[], None]:
    """vLLM's shrink and expand (vllm/lora/ops/triton_ops)."""
    operators = importlib.import_module("vllm.lora.ops.triton_ops")
    # They cache strides by the addresses of matrices, and an allocator uses addresses of an earlier step again.
    for kept in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(importlib.import_module("vllm.lora.ops.triton_ops.utils"), kept).clear()
    meta = operators.LoRAKernelMeta.make(len(problem.a[0]), len(problem.x), device=problem.x.device)
    meta.prepare_tensors(problem.owner.int())
    # Newer versions have a further argument: whether the grid covers only the active adapters.
    more = [True] * (len(inspect.signature(meta.meta_args).parameters) - 1)
    arguments = meta.meta_args(len(problem.x), *more)
    a, b = list(problem.a), list(problem.b)
    h = torch.empty(len(a), len(problem.x), a[0].shape[1], dtype=torch.float32, device=problem.x.device)

    def run() -> None:
        operators.lora_shrink(problem.x, a, h, *arguments, 1.0)
        operators.lora_expand(h, b, problem.y, *arguments, offset_start=0, add_inputs=True)

    return run


def sglang_triton(problem: Problem) -> Callable[[], None]:
    """SGLang's backend `triton`: its operator for the site's kind of linear, with the runs as segments."""
    widths = [b.shape[1] for b in problem.b]
    sizes: tuple[torch.Tensor | int, ...] = ()
    if len(widths) == 1:
        expand = _sglang("sgemm_lora_b").sgemm_lora_b_fwd
    elif len(widths) == 2:
        expand, sizes = _sglang("gate_up_lora_b").gate_up_lora_b_fwd, (widths[0],)
    else:
        expand, sizes = _sglang("qkv_lora_b").qkv_lora_b_fwd, (_columns(problem), max(widths))
    shrink = _sglang("sgemm_lora_a").sgemm_lora_a_fwd
    a, b = _joined(problem)
    batch = _sglang_batch(problem)

    def run() -> None:
        expand(shrink(problem.x, a, batch, len(widths)), b, batch, *sizes, base_output=problem.y)

    return run


def sglang_csgmv(problem: Problem) -> Callable[[], None]:
    """SGLang's backend `csgmv`, its default: the runs in chunks."""
    shrink = _sglang("chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    expand = _sglang("chunked_sgmv_expand").chunked_sgmv_lora_expand_forward
    widths = [b.shape[1] for b in problem.b]
    a, b = _joined(problem)
    columns, batch = _columns(problem), _sglang_batch(problem, chunk=_CHUNK)
    columns_on_cpu = columns.cpu()

    def run() -> None:
        h = shrink(problem.x, a, batch, num_slices=len(widths))
        expand(h, b, batch, columns, max(widths), base_output=problem.y, slice_offsets_cpu=columns_on_cpu)

    return run


def _sglang(module: str) -> Any:
    """A module with operators of SGLang, set to look up compiled kernels by Triton."""
    # SGLang's own lookup ignores the rank, which is the same for a whole server.
    os.environ["SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE"] = "0"
    return importlib.import_module(f"{_SGLANG}.{module}")


def _sglang_batch(problem: Problem, chunk: int | None = None) -> Any:
    """SGLang's description of the runs: a segment each or, given `chunk`, segments of at most as many rows."""
    device, adapters = problem.x.device, len(problem.a[0])
    longest = chunk or len(problem.x)
    segments = [
        (adapter, min(longest, run.rows.stop - start))
        for adapter, run in enumerate(problem.batch.runs)
        for start in range(run.rows.start, run.rows.stop, longest)
    ]
    owners, lengths = zip(*segments, strict=True)

    def integers(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    return importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo(
        use_cuda_graph=False,
        bs=len(segments),
        num_segments=len(segments),
        seg_indptr=integers(accumulate(lengths, initial=0)),
        weight_indices=integers(owners),
        lora_ranks=integers([problem.a[0].shape[1]] * adapters),
        scalings=torch.ones(adapters, device=device),
        max_len=chunk or max(lengths),
        seg_lens=integers(lengths),
        permutation=integers(range(len(problem.x))),
    )


def _joined(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """A [adapters, modules * rank, d_in] and B [adapters, sum of widths, rank] of all modules."""
    return torch.cat(problem.a, dim=1), torch.cat(problem.b, dim=1)


def _columns(problem: Problem) -> torch.Tensor:
    """int32 [modules + 1]: where the columns of each module start, and their end."""
    starts = accumulate((b.shape[1] for b in problem.b), initial=0)
    return torch.tensor(list(starts), dtype=torch.int32, device=problem.x.device)


#: By name, which has the package and its backend: the package, and the function that prepares a step.
RIVALS: dict[str, tuple[str, Callable[[Problem], Callable[[], None]]]] = {
    "vLLM's Punica": ("vllm", vllm_punica),
    "SGLang's triton": ("sglang", sglang_triton),
    "SGLang's csgmv": ("sglang", sglang_csgmv),
}
