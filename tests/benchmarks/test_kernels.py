"""The kernels' benchmark compares equal computations and reports its medians."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping

import pytest
import torch

from loramill.errors import InvalidRequest, SetupError
from loramill.kernels import Batch, backend
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill_bench.kernels import Model, Result, attention, cuda, linear, lora, on_cuda, run
from loramill_bench.kernels.model import SMOLLM2_135M, Linears, step

TINY = Model(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96)
ONCE = Effort(seconds=0, rounds=1)

#: The required targets, by case.
TARGETS = {
    "lora 8/8/16: added": "<= 0.25",
    "lora 8/8/16: PEFT's loop over added": ">= 12",
    "lora 8/8/16: gather + bmm over added": ">= 4",
    "lora 32/32/16: added": "<= 0.4",
    "lora 32/32/16: PEFT's loop over added": ">= 15",
    "lora 32/32/16: gather + bmm over added": ">= 3",
    "lora 32/32/16: slab": ">= 0.65",
    "lora 32/1/16: added": "<= 0.08",
    "lora 8/8/64: added": "<= 0.8",
    "lora 8/8/64: slab": ">= 0.65",
    "lora 512/1/16: added": "<= 0.07",
    "lora 512/4/16: added": "<= 0.09",
    "linear limits: M=1": "<= 1.25",
    "linear limits: M=32": ">= 0.7",
    "linear against torch: worst M": ">= 1",
    "linear fp32 avx2: worst M": ">= 1",
    "attention 32x512": "<= 1.5",
    "attention 32x512, shuffled blocks": "<= 1.5",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SQUARES", (32,))
    monkeypatch.setattr(linear, "ROWS", (1, 8, 33))


def give_times(monkeypatch: pytest.MonkeyPatch, module: object, *times: Mapping[str, float]) -> None:
    """Makes a module's variants take the given times, one mapping per call, and checks their names."""
    left = iter(times)

    def fake(variants: Mapping[str, Callable[[], object]], effort: Effort) -> Mapping[str, float]:
        medians = next(left)
        assert variants.keys() == medians.keys()
        return medians

    monkeypatch.setattr(module, "interleaved", fake)


def values(results: list[Result]) -> dict[str, float]:
    return {result.case: result.value for result in results}


@pytest.mark.parametrize(
    ("dtype", "stored", "error"),
    [
        (torch.float32, torch.float32, 3e-5),
        # The loop rounds h, the delta, its scaled value and y.
        (torch.bfloat16, torch.bfloat16, 4 * 2**-7),
        (torch.bfloat16, torch.int8, 4 * 2**-7 + 0.02),
    ],
)
@pytest.mark.parametrize(("rows", "adapters", "rank"), [(1, 1, 4), (6, 3, 5), (8, 8, 16), (40, 1, 16)])
def test_every_way_to_add_adapters_adds_the_same(
    rows: int, adapters: int, rank: int, dtype: torch.dtype, stored: torch.dtype, error: float
) -> None:
    kernels, mix, sites = backend(), lora.Mix(rows, adapters, rank, added_share=1), TINY.sites
    # Larger than trained ones: the adapters' part must exceed the rounding errors.
    stacks = [[lora.Stack(its.a * 10, its.b * 50) for its in lora.random_stacks(site, mix, dtype)] for site in sites]
    slab, slots = lora.filled_slab(kernels, sites, stacks, stored)
    owners = sorted(index % adapters for index in range(rows))
    batch = Batch.of((slots[owner], 1) for owner in owners)
    for view, its in zip(slab.views, stacks, strict=True):
        x = torch.randn(rows, view.site.d_in, dtype=dtype)
        start = torch.randn(rows, sum(view.site.widths), dtype=dtype)
        ours, looped, gathered = start.clone(), start.clone(), start.clone()
        kernels.lora(x, ours, view, batch)
        column = 0
        for width, stack in zip(view.site.widths, its, strict=True):
            part = slice(column, column + width)
            lora.add_in_loop(x, looped[:, part], stack, owners)
            lora.add_gathered(x, gathered[:, part], stack, torch.tensor(owners))
            column += width
        largest = (ours - start).abs().max().item()
        assert largest > 0.3
        close = {"rtol": 0, "atol": error * max(1.0, largest)}
        torch.testing.assert_close(looped, ours, **close)
        torch.testing.assert_close(gathered, ours, **close)


def test_step_passes_every_linear_and_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend()
    linears = Linears.random(kernels, TINY, torch.float32)
    stacks = [lora.random_stacks(site, lora.Mix(2, 2, 4, added_share=1), torch.float32) for site in linears.sites]
    slab, slots = lora.filled_slab(kernels, linears.sites, stacks, torch.float32)
    calls = []

    class Spy:
        def adapted_linear(self, *arguments: object) -> torch.Tensor:
            calls.append(arguments)
            return kernels.adapted_linear(*arguments)

    batch = Batch.of((slot, 1) for slot in slots)
    step(Spy(), linears, linears.inputs(2), slab, batch)()
    assert [(len(x), x.shape[1]) for x, *_ in calls] == [(2, site.d_in) for site in linears.sites]
    assert [weight for _, weight, *_ in calls] == list(linears.weights)
    assert [(view, its) for *_, view, its in calls] == [(view, batch) for view in slab.views]


def test_smollm2_has_all_its_projections() -> None:
    modules = [module for site in SMOLLM2_135M.sites for module in site.modules]
    assert len(modules) == len(set(modules)) == 7 * 30
    # 134,515,008 parameters less the embedding of 49,152 tokens and 61 norms.
    weights = sum(site.d_in * sum(site.widths) for site in SMOLLM2_135M.sites)
    assert weights == 134_515_008 - 49_152 * 576 - 61 * 576


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_variants_take_turns_and_the_first_round_warms_up(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = 0.0, []
    durations = {"a": itertools.chain([100.0], itertools.cycle([1.0, 9.0, 2.0])), "b": itertools.repeat(4.0)}

    def variant(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal clock
            calls.append(name)
            clock += next(durations[name])

        return call

    monkeypatch.setattr(time, "thread_time", lambda: clock)
    medians = interleaved({name: variant(name) for name in durations}, Effort(0, rounds))
    assert calls == (["a", "b", "b", "a"] * rounds)[: 2 * rounds + 2]
    assert medians == {"a": {1: 1.0, 2: 5.0, 5: 2.0}[rounds], "b": 4.0}


def test_seconds_are_of_the_given_clock() -> None:
    ticks = itertools.count(0, 3)
    assert interleaved({"a": lambda: next(ticks), "b": lambda: None}, Effort(0, 3), lambda: next(ticks)) == {
        "a": 6,
        "b": 3,
    }


def test_rounds_continue_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    calls = []
    interleaved({"a": lambda: calls.append(1)}, Effort(seconds=7, rounds=1))
    assert 7 <= len(calls) <= 9


@pytest.mark.parametrize("size", [8, 4096, (2 << 20) + 24, 12_345_678])
def test_pure_read_reads_every_byte(size: int) -> None:
    total = pure_read(size)()
    words = -(-size // 8)
    assert isinstance(total, torch.Tensor)
    assert total.item() % 2**64 == words * 0x0101010101010101 % 2**64


@pytest.mark.parametrize(
    ("value", "target", "better", "met", "target_text"),
    [
        (0.2, 0.25, "lower", True, "<= 0.25"),
        (0.25, 0.25, "lower", True, "<= 0.25"),
        (0.26, 0.25, "lower", False, "<= 0.25"),
        (12.0, 12.0, "higher", True, ">= 12"),
        (11.9, 12.0, "higher", False, ">= 12"),
        (math.nan, 1.0, "lower", False, "<= 1"),
        (math.nan, 1.0, "higher", False, ">= 1"),
        (5.0, None, "lower", None, ""),
    ],
)
def test_verdict(value, target, better, met, target_text) -> None:
    result = Result("case", value, "x", target, better)
    assert (result.met, result.target_text) == (met, target_text)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "lora 4/2/8"), (torch.int8, "lora 4/2/8 int8")])
def test_lora_reports_its_medians(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend()
    linears = Linears.random(kernels, TINY, torch.bfloat16)
    give_times(monkeypatch, lora, {"adapted": 3.0, "base": 2.0, "read": 0.8, "loop": 12.0, "gather": 5.0})
    mix = lora.Mix(4, 2, 8, added_share=0.25, loop_ratio=12, gather_ratio=4, read_share=0.65)
    results = lora.measure(kernels, linears, mix, dtype, ONCE)
    assert values(results) == {
        f"{name}: added": 0.5,
        f"{name}: PEFT's loop over added": 12.0,
        f"{name}: gather + bmm over added": 5.0,
        f"{name}: slab": 0.8,
    }
    assert [result.floor for result in results] == [0.4, None, None, None]
    assert [result.met for result in results] == [False, True, True, True]


@pytest.mark.parametrize("square", [4, 16])
def test_linear_reports_its_medians(square: int, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square product does the operations of `square` rows per second; 512 rows do those of 8 per second."""
    kernels = backend()
    linears = Linears.random(kernels, TINY, torch.bfloat16)
    row = 2 * linears.parameters  # operations
    times = {"M=1": 1.5, "M=32": 8.0, "M=512": 64.0, "mm 32": 2 * 32**3 / (square * row), "read": 1.25}
    give_times(monkeypatch, linear, times)
    found = values(linear.against_limits(kernels, linears, ONCE))
    assert found["linear limits: M=1"] == 1.2
    assert found["linear limits: M=32"] == pytest.approx(32 / 8 / max(square, 8))
    assert found["linear limits: GEMM peak"] == pytest.approx(row * max(square, 8) / 1e9)
    assert found["linear limits: pure read"] == pytest.approx(linears.bytes / 1.25 / 1e9)


def test_avx2_tier_is_measured_at_its_worst_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend()
    linears = Linears.random(kernels, TINY, torch.float32)
    give_times(monkeypatch, linear, {"ours": 2.0, "0": 3.0}, {"ours": 4.0, "0": 3.0}, {"ours": 1.0, "0": 9.0})
    results = linear.against_torch_in_float(kernels, linears, ONCE)
    assert [result.value for result in results] == [1.5, 0.75, 9.0, 0.75]
    assert [result.met for result in results] == [None, None, None, False]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="mkldnn has no bfloat16 here")
def test_the_fastest_baseline_counts(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend()
    linears = Linears.random(kernels, TINY, torch.bfloat16)
    times = ({"ours": 2.0, "0": 3.0, "1": 5.0}, {"ours": 2.0, "0": 7.0, "1": 4.0}, {"ours": 2.0, "0": 8.0, "1": 8.0})
    give_times(monkeypatch, linear, *times)
    assert [result.value for result in linear.against_torch(kernels, linears, ONCE)] == [1.5, 2.0, 4.0, 1.5]


def test_attention_reads_a_cache_that_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, caches, sizes = backend(), [], []
    new_kv = kernels.new_kv
    monkeypatch.setattr(kernels, "new_kv", lambda *arguments: caches.append(new_kv(*arguments)) or caches[-1])
    monkeypatch.setattr(attention, "pure_read", lambda size: sizes.append(size) or (lambda: None))
    give_times(monkeypatch, attention, {"": 3.0, ", shuffled blocks": 4.0, "read": 2.0})
    results = attention.measure(kernels, TINY, ONCE)
    assert [(result.value, result.met) for result in results] == [(1.5, True), (2.0, False)]
    for cache in caches:
        parts = [part for kv in cache for part in (kv.keys, kv.values)]
        assert len(parts) == 2 * TINY.layers
        assert sizes == [sum(part.nbytes for part in parts)]
        assert all(part.count_nonzero() > 0.95 * part.numel() for part in parts)


def test_run_measures_every_case(small: None) -> None:
    reported = []
    results = run(model=TINY, effort=ONCE, report=reported.append)
    cases = [result.case for result in results]
    assert len(cases) == len(set(cases))
    assert all(any(case.startswith(group) for group in reported) for case in cases)
    native = backend().name.startswith("cpu")
    in_int8 = {case.replace(":", " int8:"): target for case, target in TARGETS.items() if case.startswith("lora")}
    expected = {case: target for case, target in (TARGETS | in_int8).items() if native or "avx2" not in case}
    assert {result.case: result.target_text for result in results if result.target is not None} == expected
    assert all(math.isfinite(result.value) for result in results)
    assert {result.case for result in results if result.floor} == {case for case in cases if case.endswith("added")} - {
        case for case in cases if " over " in case
    }


def test_run_measures_only_the_selected_cases() -> None:
    results = run(only="8/8/", model=TINY, effort=ONCE)
    assert {result.case.partition(":")[0] for result in results} == {
        f"lora 8/8/{suffix}" for suffix in ("16", "64", "16 int8", "64 int8")
    }
    with pytest.raises(InvalidRequest, match=r"'nothing'.*lora 8/8/16.*attention"):
        run(only="nothing", model=TINY, effort=ONCE)


def test_without_a_gpu_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="no CUDA device"):
        run("cuda")


@pytest.mark.parametrize(("errors", "worst", "met"), [((1e-4, 3e-3), 3e-3, True), ((0.1, 0.0), 0.1, False)])
def test_worst_error_on_the_gpu_decides(monkeypatch: pytest.MonkeyPatch, errors, worst, met) -> None:
    checks = [cuda.Check("site", "torch.bfloat16", "runs", error, 0.016) for error in errors]
    monkeypatch.setattr(cuda, "check", lambda dtypes: checks if dtypes == [torch.bfloat16] else [])
    (result,) = on_cuda.groups()["cuda check bfloat16"]()
    assert (result.value, result.met) == (worst, met)


@pytest.mark.parametrize("index", [0, 1])
def test_nan_on_the_gpu_is_the_worst_error(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    checks = [cuda.Check("site", "torch.float32", "runs", 0.0, 1e-5)]
    checks.insert(index, cuda.Check("site", "torch.float32", "runs", math.nan, 1e-5))
    monkeypatch.setattr(cuda, "check", lambda dtypes: checks)
    (result,) = on_cuda.groups()["cuda check float32"]()
    assert math.isnan(result.value)
    assert result.met is False


def test_timings_on_the_gpu_are_one_row_per_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = cuda.Timing("o 4096 -> 4096", cuda.Case(8, 8, 16), 7.0, 8.0, None, 5.0, 40.0, 20.0)
    monkeypatch.setattr(cuda, "timings", lambda cases: [timing] if cases == [timing.case] else [])
    results = on_cuda.groups()["cuda 8/8/16"]()
    assert {result.case: (result.value, result.floor) for result in results} == {
        "cuda 8/8/16 o 4096 -> 4096: lora": (7.0, 5.0),
        "cuda 8/8/16 o 4096 -> 4096: lora in a graph for any batch": (8.0, 5.0),
        "cuda 8/8/16 o 4096 -> 4096: gather + bmm": (40.0, 5.0),
        "cuda 8/8/16 o 4096 -> 4096: base": (20.0, None),
    }
