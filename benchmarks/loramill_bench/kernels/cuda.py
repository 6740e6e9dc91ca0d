"""The Triton kernels on a real GPU: correctness in every dtype, and time compared with reading their bytes.

Times are medians of replays of a CUDA graph between two events, with a cold L2 cache.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from loramill.kernels import reference
from loramill.kernels.adapters.packing import Delta, Layout, Site
from loramill.kernels.adapters.slab import SiteSlab, Slab
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.memory import aligned


@dataclass(frozen=True, slots=True)
class Case:
    """A step of `rows` rows, in equal runs of `adapters` adapters of one rank."""

    rows: int
    adapters: int
    rank: int


@dataclass(frozen=True, slots=True)
class Check:
    """The largest error of a step, relative to the largest value of the result, and its limit."""

    site: str
    dtype: str
    runs: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; False for NaN."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one step at one site, in microseconds.

    Attributes:
        site: Modules and dimensions.
        case: The step.
        us: Time of `lora`.
        graph_us: Time of `lora` in a graph for any batch of as many rows and the same rank; None: there are more rows
            than `GRAPH_ROWS`.
        fused_us: Time of the kernel that shrinks and expands in one launch; None: it does not support the case.
        floor_us: Time of copying as many bytes as the step must read and write.
        gather_us: Time of gathering each row's matrices, followed by torch.bmm.
        linear_us: Time of the base's linear.
    """

    site: str
    case: Case
    us: float
    graph_us: float | None
    fused_us: float | None
    floor_us: float
    gather_us: float
    linear_us: float

    @property
    def ratio(self) -> float:
        """The time of `lora` divided by the floor."""
        return self.us / self.floor_us


#: The linears of a layer of Llama-3-8B.
LLAMA_3_8B = (
    Site(4096, ("q", "k", "v"), (4096, 1024, 1024)),
    Site(4096, ("o",), (4096,)),
    Site(4096, ("gate", "up"), (14336, 14336)),
    Site(14336, ("down",), (4096,)),
)
CASES = tuple(
    Case(*numbers)
    for numbers in (
        *((8, 8, 16), (32, 32, 16), (32, 1, 16), (128, 128, 16), (8, 8, 64)),
        *((512, 1, 16), (512, 4, 16), (4096, 8, 16)),
    )
)

#: Maximum rows for which an engine has a graph: decode, not prefill.
GRAPH_ROWS = 256

#: Sites that `check` covers: odd dimensions, and one of each kind of site.
CHECKED_SITES = (
    Site(37, ("q", "k", "v"), (29, 5, 11)),
    Site(1024, ("q", "k", "v"), (1024, 256, 256)),
    Site(4096, ("gate", "up"), (1536, 1536)),
)
#: Runs that `check` covers, as pairs of an adapter (None: the base) and a number of rows.
CHECKED_RUNS: tuple[tuple[tuple[int | None, int], ...], ...] = (
    ((None, 3),),
    ((0, 1),),
    ((0, 1), (1, 1), (None, 1), (2, 1), (3, 1), (4, 1), (5, 2)),
    ((5, 7), (None, 2), (1, 33)),
    ((3, 128), (0, 1), (None, 1), (4, 200), (2, 65)),
)
CHECKED_RANKS = (8, 1, 17, 64, 256, 16)
#: Twice the error of one rounding of h and one of y, or of float32's sums.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(
    device: str = "cuda",
    *,
    sites: Iterable[Site] = CHECKED_SITES,
    dtypes: Iterable[torch.dtype] = tuple(LIMITS),
    runs: Iterable[Iterable[tuple[int | None, int]]] = CHECKED_RUNS,
) -> Iterator[Check]:
    """Compares `lora` with the reference in float32, called and, on a GPU, replayed from a graph.

    Adapters are in the rows' dtype and, with rows of bfloat16, in int8.
    """
    from loramill.kernels import triton

    steps = [tuple(step) for step in runs]
    for dtype in dtypes:
        for site, stored in product(sites, (dtype, torch.int8) if dtype == torch.bfloat16 else (dtype,)):
            adapters = [adapter(site, rank, gain=rank == 17) for rank in CHECKED_RANKS]
            plain, slots = filled_slab(site, adapters, stored, reference.layout, "cpu")
            slab, _ = filled_slab(site, adapters, stored, triton.layout, device)
            for step in steps:
                batch = Batch.of((None if index is None else slots[index], count) for index, count in step)
                x, y = inputs(site, batch.rows, dtype, "cpu")
                expected = y.to(torch.float32, copy=True)
                reference.lora(x, expected, plain.views[0], batch)
                for mode, got in _results(slab, batch, x.to(device), y.to(device)):
                    error = (got.cpu().float() - expected).abs().max() / expected.abs().max()
                    case = f"{mode}: {step}" if stored == dtype else f"{mode}: {step}, adapters in int8"
                    yield Check(name(site), str(dtype), case, error.item(), LIMITS[dtype])


def _results(slab: Slab, batch: Batch, x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from loramill.kernels import triton

    called = y.clone()
    triton.lora(x, called, slab.views[0], batch)
    yield "called", called
    if y.is_cuda:
        # The kernels are compiled now, so that an equal step must not wait for the device.
        again, fresh = y.clone(), Batch(batch.rows, batch.runs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            triton.lora(x, again, slab.views[0], fresh)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield "called again", again
        static = triton.StaticPlan(slab, rows=batch.rows, rank=max(CHECKED_RANKS))
        replayed = y.clone()
        graph = captured(lambda: triton.lora(x, replayed, slab.views[0], static.batch))
        static.refresh(batch)
        replayed.copy_(y)
        graph.replay()
        yield "replayed", replayed


def timings(
    cases: Iterable[Case] = CASES, sites: Iterable[Site] = LLAMA_3_8B, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Timing]:
    """Times every case at every site on the current GPU."""
    bandwidth = copy_bandwidth()
    steps = tuple(cases)
    for site in sites:
        weight = torch.randn(sum(site.widths), site.d_in, device="cuda", dtype=dtype)
        for case in steps:
            problem = random_problem(site, case, dtype, "cuda")
            fused = fused_launch(problem)
            yield Timing(
                site=name(site),
                case=case,
                us=median_us(lora_launches(problem)),
                graph_us=median_us(static_launches(problem)) if case.rows <= GRAPH_ROWS else None,
                fused_us=None if fused is None else median_us(fused),
                floor_us=floor_bytes(site, case, dtype.itemsize) / bandwidth * 1e6,
                gather_us=median_us(partial(gather_bmm, problem)),
                linear_us=median_us(partial(F.linear, problem.x, weight)),
            )


@dataclass(frozen=True, slots=True)
class Problem:
    """A case at a site, in the forms that the compared implementations take.

    Attributes:
        slab: A slab of one site, in the layout of the Triton kernels.
        batch: The runs.
        x: [rows, d_in].
        y: [rows, sum of widths].
        a: [adapters, rank, d_in] per module.
        b: [adapters, width, rank] per module.
        owner: int64 [rows]: the adapter of each row.
    """

    slab: Slab
    batch: Batch
    x: torch.Tensor
    y: torch.Tensor
    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    owner: torch.Tensor

    @property
    def view(self) -> SiteSlab:
        """The slab at the site."""
        return self.slab.views[0]


def random_problem(site: Site, case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random adapters and inputs for a case."""
    from loramill.kernels import triton

    adapters = [adapter(site, case.rank) for _ in range(case.adapters)]
    slab, slots = filled_slab(site, adapters, dtype, triton.layout, device)
    each = case.rows // case.adapters
    x, y = inputs(site, case.rows, dtype, device)
    return Problem(
        slab=slab,
        batch=Batch.of((slot, each) for slot in slots),
        x=x,
        y=y,
        a=tuple(torch.stack([deltas[module].a for deltas in adapters]).to(device, dtype) for module in site.modules),
        b=tuple(torch.stack([deltas[module].b for deltas in adapters]).to(device, dtype) for module in site.modules),
        owner=torch.arange(case.adapters, device=device).repeat_interleave(each),
    )


def adapter(site: Site, rank: int, *, gain: bool = False) -> dict[str, Delta]:
    """Random deltas of one rank for all modules of a site; their results have a standard deviation of about 1."""
    return {
        module: Delta(
            torch.randn(rank, site.d_in) / site.d_in**0.5,
            torch.randn(width, rank) / rank**0.5,
            torch.rand(width) + 0.5 if gain else None,
        )
        for module, width in zip(site.modules, site.widths, strict=True)
    }


def inputs(site: Site, rows: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random x and y."""
    x, y = torch.randn(rows, site.d_in), torch.randn(rows, sum(site.widths))
    return x.to(device, dtype), y.to(device, dtype)


def filled_slab(
    site: Site, adapters: list[dict[str, Delta]], dtype: torch.dtype, layout: Layout, device: str
) -> tuple[Slab, list[Slot]]:
    """A slab of one site that is filled with adapters, and their slots."""
    empty = Slab([site], slots=0, size=0, dtype=dtype, layout=layout)
    packed = [empty.pack(deltas) for deltas in adapters]
    size = sum(aligned(each.bytes) for each in packed)
    slab = Slab([site], slots=len(packed), size=size, dtype=dtype, layout=layout, device=device)
    slots = []
    for each in packed:
        slot = slab.allocate(each.bytes)
        assert slot is not None, "the slab was made to measure"
        slab.load(slot, each)
        slots.append(slot)
    return slab, slots


def name(site: Site) -> str:
    """The name of a site, such as `q+k+v 4096 -> 4096+1024+1024`."""
    return f"{'+'.join(site.modules)} {site.d_in} -> {'+'.join(map(str, site.widths))}"


def floor_bytes(site: Site, case: Case, itemsize: int) -> int:
    """Bytes that a step must read and write: its adapters and x once, and y twice."""
    columns = sum(site.widths)
    weights = case.adapters * case.rank * (len(site.modules) * site.d_in + columns)
    return (weights + case.rows * (site.d_in + 2 * columns)) * itemsize


def lora_launches(problem: Problem) -> Callable[[], None]:
    """`lora` on a batch that is known in advance."""
    from loramill.kernels import triton

    return lambda: triton.lora(problem.x, problem.y, problem.view, problem.batch)


def static_launches(problem: Problem) -> Callable[[], None]:
    """`lora` as an engine's graph of as many rows contains it, with the batch as its current work."""
    from loramill.kernels import triton

    static = triton.StaticPlan(problem.slab, rows=len(problem.x), rank=problem.a[0].shape[1])
    static.refresh(problem.batch)
    return lambda: triton.lora(problem.x, problem.y, problem.view, static.batch)


def fused_launch(problem: Problem) -> Callable[[], None] | None:
    """The one-launch kernel, even where the plan does not use it; None if it does not support the rows or ranks."""
    from loramill.kernels.triton import plans

    host = importlib.import_module("loramill.kernels.triton.lora")
    work = host.build_work(problem.slab, problem.batch)
    if work.plan.rows > 1 or work.rank > plans.FUSED.ranks:
        return None
    site = work.resident.sites[problem.view.index]
    return lambda: host.fused(problem.x, problem.y, site, work)


def gather_bmm(problem: Problem) -> None:
    """The simplest implementation in torch: gathers each row's matrices, then two batched products."""
    column = 0
    for a, b in zip(problem.a, problem.b, strict=True):
        part = problem.y[:, column : column + b.shape[1]]
        h = torch.bmm(a[problem.owner], problem.x[:, :, None])
        part += torch.bmm(b[problem.owner], h)[:, :, 0]
        column += b.shape[1]


def copy_bandwidth() -> float:
    """Bytes per second that a copy within the GPU's memory reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us(lambda: target.copy_(source)) * 1e6


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches; `run` first warms up on a side stream."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def median_us(run: Callable[[], object], repeats: int = 50) -> float:
    """Median microseconds of a replay of `run`'s graph with a cold L2 cache."""
    graph = captured(run)
    # Writing twice as many bytes as a GPU's L2 cache has evicts everything else.
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in events]
    return statistics.median(milliseconds) * 1e3
