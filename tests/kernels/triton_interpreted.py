"""Multi-LoRA by the Triton kernels against the contract in float64; test_triton.py runs this under the interpreter.

bfloat16 is left to the kernels without `tl.dot`: the interpreter multiplies its bits as integers there.
"""

import gc
import importlib
import random
import weakref
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.kernels import Batch, Delta, Site, Slab
from loramill.kernels.adapters.packing import ROWS
from loramill.kernels.triton import StaticPlan, adapted_linear, layout, lora, pack, plans
from loramill_bench.kernels import cuda

from ..triton_interpreter import fast_interpreter, nan_in_fresh_memory  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
host = importlib.import_module("loramill.kernels.triton.lora")

#: Odd dimensions; a sum over d_in of several splits; modules of several blocks of columns.
SITES = (
    Site(37, ("q", "k", "v"), (29, 5, 11)),
    Site(300, ("o",), (70,)),
    Site(16, ("gate", "up"), (520, 520)),
)
#: The ranks of each adapter; a module has one of the two.
RANKS = ((1, 1), (3, 8), (8, 8), (17, 1), (16, 4), (64, 3), (8, 1), (256, 16), (2, 5), (16, 16), (8, 3), (128, 7))
COUNTS = (1, 2, 7, 8, 33, 128)
POPULARITY = ("none", "one", "distinct", "uniform", "zipf", "skewed")
ADAPTERS = len(RANKS)
#: Unit roundoffs, of the sum of its terms' magnitudes, by which a result may be off: h and y are rounded once each, and
#: float32's own sums of up to 300 terms are most of what there is for float32.
UNITS = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}


def random_adapter(dtype, ranks=(1, 8, 20), absent=0.25, gains=0.3):
    """A delta with a rank of its own per module, some with a gain; some modules have none."""
    deltas = {}
    for site in SITES:
        for module, width in zip(site.modules, site.widths, strict=True):
            r = random.choice(ranks)
            a, b = torch.randn(r, site.d_in) / site.d_in**0.5, torch.randn(width, r) / r**0.5
            gain = torch.rand(width) + 0.5 if random.random() < gains else None
            if random.random() >= absent:
                deltas[module] = Delta(a.to(dtype), b.to(dtype), gain)
    return deltas


def dequantized(deltas):
    """An adapter as `reference` reads it from a slab of int8."""
    slab = Slab(SITES, slots=1, size=1 << 20, dtype=torch.int8, layout=ROWS)
    packed = slab.pack(deltas)
    slab.load(slab.allocate(packed.bytes), packed)
    return {
        module: view.delta(0, index)
        for view in slab.views
        for index, module in enumerate(view.site.modules)
        if module in deltas
    }


class Loaded:
    """A slab whose free memory is NaN, with `adapters` in it."""

    def __init__(self, adapters, dtype, size=4 << 20):
        self.slab = Slab(SITES, slots=len(adapters) + 1, size=size, dtype=dtype, layout=layout)
        self.slab.arena.view(torch.float32 if dtype == torch.int8 else dtype).fill_(torch.nan)
        self.slots = [self.load(deltas) for deltas in adapters]
        self.adapters = [dequantized(deltas) for deltas in adapters] if dtype == torch.int8 else adapters

    def load(self, deltas):
        packed = self.slab.pack(deltas)
        slot = self.slab.allocate(packed.bytes)
        self.slab.load(slot, packed)
        return slot

    def batch(self, owner):
        return Batch.of((None if index is None else self.slots[index], 1) for index in owner)


def owners(popularity, rows):
    draws = {
        "none": lambda _: None,
        "one": lambda _: 0,
        "distinct": lambda row: row % ADAPTERS,
        "uniform": lambda _: random.choice([None, *range(ADAPTERS)]),
        "zipf": lambda _: min(ADAPTERS, int(1 / (1 - random.random()))) - 1,
        "skewed": lambda row: None if row < rows // 3 else 3 if row < rows - 1 else 5,
    }
    drawn = [draws[popularity](row) for row in range(rows)]
    return sorted(drawn) if popularity == "zipf" else drawn


def contract(x, y, site, adapters, owner):
    """The docstring of `lora` in float64, one adapter and module at a time, and the sum of its terms' magnitudes."""
    expected, magnitude = y.double(), y.double().abs()
    for index in {*owner} - {None}:
        rows = [row for row, its in enumerate(owner) if its == index]
        column = 0
        for module, width in zip(site.modules, site.widths, strict=True):
            if (delta := adapters[index].get(module)) is not None:
                part = slice(column, column + width)
                gain = 1 if delta.gain is None else delta.gain.double()
                a, b, own = delta.a.double(), delta.b.double(), x[rows].double()
                expected[rows, part] = gain * (expected[rows, part] + own @ a.T @ b.T)
                magnitude[rows, part] = gain * (magnitude[rows, part] + own.abs() @ a.abs().T @ b.abs().T)
            column += width
    return expected, magnitude


def assert_close(got, expected, magnitude):
    error = (got.double() - expected).abs() / (magnitude * torch.finfo(got.dtype).eps * UNITS[got.dtype])
    # A NaN is not a small error.
    error = torch.where(error.isnan(), torch.inf, error)
    worst = error.flatten().topk(min(5, error.numel())).indices.tolist()
    lines = [
        f"row {i // got.shape[1]}, column {i % got.shape[1]}: {got.flatten()[i].item()} for "
        f"{expected.flatten()[i].item()}, off by {error.flatten()[i].item():.2f} times the tolerance"
        for i in worst
    ]
    assert error.max() <= 1, "\n".join(lines)


def inputs(site, rows, dtype):
    return torch.randn(rows, site.d_in).to(dtype), torch.randn(rows, sum(site.widths)).to(dtype)


def check(loaded, owner, dtype, sites=SITES):
    """One step over several sites with one batch, as in a decoder's layers."""
    batch = loaded.batch(owner)
    for site in sites:
        view = loaded.slab.views[SITES.index(site)]
        x, y = inputs(site, len(owner), dtype)
        got = y.clone()
        lora(x, got, view, batch)
        assert_close(got, *contract(x, y, site, loaded.adapters, owner))
        base = [row for row, index in enumerate(owner) if index is None]
        assert torch.equal(got[base], y[base])


@pytest.fixture(scope="module")
def loaded():
    return {
        dtype: Loaded(
            [random_adapter(torch.float32 if dtype == torch.int8 else dtype, ranks) for ranks in RANKS], dtype
        )
        for dtype in (*UNITS, torch.int8)
    }


#: Dtypes of slab and rows.
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.int8, torch.float32)]
DTYPES += [(torch.int8, torch.float16)]
#: Every popularity with every count, and the dtypes by turns.
MIXES = [
    (popularity, rows, *DTYPES[(i + j) % 4]) for i, popularity in enumerate(POPULARITY) for j, rows in enumerate(COUNTS)
]


@pytest.mark.parametrize(("popularity", "rows", "slab_dtype", "dtype"), MIXES)
def test_every_mix_of_adapters_keeps_the_contract(loaded, popularity, rows, slab_dtype, dtype):
    # The interpreter takes a millisecond per program: many rows run at one site only.
    sites = SITES if rows < 8 else SITES[:1] if rows < 128 else SITES[1:2]
    check(loaded[slab_dtype], owners(popularity, rows), dtype, sites)


@pytest.mark.parametrize(
    ("slab_dtype", "dtype"), [*((dtype, dtype) for dtype in UNITS), (torch.int8, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("ranks", [(8, 1, 16), (70, 3)])
def test_single_rows_keep_the_contract_fused_and_in_two_launches(slab_dtype, dtype, ranks):
    loaded = Loaded([random_adapter(dtype, ranks) for _ in range(5)], slab_dtype)
    check(loaded, random.sample([*range(5), None], 6), dtype)


@pytest.mark.parametrize(
    ("plan", "slab_dtype"), [(plan, (torch.int8, torch.float16)[i % 2]) for i, (_, _, plan) in enumerate(plans.TABLE)]
)
def test_every_plan_keeps_the_contract(loaded, monkeypatch, plan, slab_dtype):
    monkeypatch.setattr(plans, "choose", lambda longest, rank: plan)
    monkeypatch.setattr(plans, "PROGRAMS", random.choice([1, 40, 512]))
    owner = [2] * 17 + [None] * 2 + [5] * 3 + [4, 6]
    check(loaded[slab_dtype], owner, torch.float16)


@settings(max_examples=10)
@given(data=st.data())
def test_any_batch_keeps_the_contract(loaded, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    runs = data.draw(
        st.lists(st.tuples(st.none() | st.integers(0, ADAPTERS - 1), st.integers(1, 40)), min_size=1, max_size=4)
    )
    check(loaded[dtype], [index for index, count in runs for _ in range(count)], dtype)


@pytest.mark.parametrize("owner", [[0, 1, 2, 3], [0] * 30 + [1] * 3], ids=["rows", "runs"])
def test_the_same_call_gives_the_same_bits(loaded, owner):
    slab, batch = loaded[torch.float16].slab, loaded[torch.float16].batch(owner)
    for site, view in zip(SITES, slab.views, strict=True):
        x, y = inputs(site, len(owner), torch.float16)
        first, second = y.clone(), y.clone()
        lora(x, first, view, batch)
        lora(x, second, view, batch)
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("poison", "ranks", "dtype"),
    [(torch.nan, (4,), torch.float32), (torch.inf, (4, 70), torch.float32), (torch.nan, (4, 17), torch.int8)],
)
@pytest.mark.parametrize("owner", [[0, 0, 1, 2, None], [0] * 9 + [1] * 7 + [2] * 2 + [None]], ids=["rows", "runs"])
def test_an_adapter_of_nan_touches_only_its_own_rows(owner, poison, ranks, dtype):
    adapters = [random_adapter(torch.float32, ranks, absent=0, gains=0.5) for _ in range(3)]
    adapters[1] = {
        module: Delta(torch.full_like(delta.a, poison), torch.full_like(delta.b, poison), delta.gain)
        for module, delta in adapters[1].items()
    }
    loaded = Loaded(adapters, dtype)
    poisoned = torch.tensor([index == 1 for index in owner])
    sane = [None if index == 1 else index for index in owner]
    for site, view in zip(SITES[:2], loaded.slab.views, strict=False):
        x, y = inputs(site, len(owner), torch.float32)
        with_poison, without = y.clone(), y.clone()
        lora(x, with_poison, view, loaded.batch(owner))
        lora(x, without, view, loaded.batch(sane))
        assert not with_poison[poisoned].isfinite().any()
        assert torch.equal(with_poison[~poisoned], without[~poisoned])


@pytest.mark.parametrize(("rows", "rank"), [(3, 1), (3, 70), (20, 1), (20, 70)])
def test_an_infinite_x_touches_only_its_own_row(rows, rank):
    loaded = Loaded([random_adapter(torch.float32, (rank,), absent=0)], torch.float32)
    owner, bad = [0] * rows, rows // 2
    others = [row for row in range(rows) if row != bad]
    for site, view in zip(SITES[:2], loaded.slab.views, strict=False):
        x, y = inputs(site, rows, torch.float32)
        x[bad, 0] = torch.inf
        got = y.clone()
        lora(x, got, view, loaded.batch(owner))
        expected, magnitude = contract(x, y, site, loaded.adapters, owner)
        assert_close(got[others], expected[others], magnitude[others])
        assert not expected[bad].isfinite().any()
        torch.testing.assert_close(got[bad], expected[bad].float(), equal_nan=True)


@pytest.mark.parametrize("owner", [[4, None, 2], [4] * 12 + [2]], ids=["rows", "runs"])
def test_strided_rows_of_x_and_y_are_read_and_written_in_place(loaded, owner):
    site, view = SITES[0], loaded[torch.float32].slab.views[0]
    wide_x, wide_y = torch.randn(len(owner), 50), torch.randn(len(owner), 60)
    before = wide_y.clone()
    x, y = wide_x[:, 3:40], wide_y[:, 7:52]
    expected = contract(x, y, site, loaded[torch.float32].adapters, owner)
    lora(x, y, view, loaded[torch.float32].batch(owner))
    assert_close(y, *expected)
    outside = [*range(7), *range(52, 60)]
    assert torch.equal(wide_y[:, outside], before[:, outside])


def test_an_adapted_linear_is_the_linear_and_the_adapter(loaded):
    site, view = SITES[1], loaded[torch.float32].slab.views[1]
    x, weight = torch.randn(5, site.d_in), torch.randn(70, site.d_in)
    owner = [1, 1, None, 6, 7]
    got = adapted_linear(x, pack(weight), view, loaded[torch.float32].batch(owner))
    assert_close(got, *contract(x, x @ weight.T, site, loaded[torch.float32].adapters, owner))


def sends(monkeypatch):
    sent = []
    copy = host.copy_to_device
    monkeypatch.setattr(host, "copy_to_device", lambda numbers, to: (sent.append(to.shape), copy(numbers, to)))
    return sent


def test_a_step_sends_its_tiles_once_and_the_table_only_after_a_change(monkeypatch):
    sent = sends(monkeypatch)
    loaded = Loaded([random_adapter(torch.float32, absent=0) for _ in range(3)], torch.float32)
    for slots, transfers in (([0, 1], 2), ([1, 2, 2], 1), ([0], 1)):
        sent.clear()
        check(loaded, slots, torch.float32)
        assert len(sent) == transfers, sent
    loaded.slab.free(loaded.slots[0])
    loaded.adapters[0] = random_adapter(torch.float32)
    loaded.slots[0] = loaded.load(loaded.adapters[0])
    sent.clear()
    check(loaded, [0, 1], torch.float32)
    assert len(sent) == 2, sent


def test_a_step_without_adapters_or_targets_launches_nothing(monkeypatch):
    loaded = Loaded([{}], torch.float32)
    monkeypatch.setattr(host, "_launch", lambda *_, **__: pytest.fail("a kernel was launched"))
    check(loaded, [None, 0, 0], torch.float32)


def test_a_slab_is_freed_with_its_device_copies():
    loaded = Loaded([random_adapter(torch.float32)], torch.float32)
    check(loaded, [0], torch.float32)
    slab = weakref.ref(loaded.slab)
    del loaded
    gc.collect()
    assert slab() is None


@pytest.mark.parametrize("rows", [8, 33])
def test_a_graph_replays_any_batch_that_fits(rows):
    """A capture records launches: the same tensors, grid and constants. Here the launches themselves are repeated."""
    dtype = torch.float32
    loaded = Loaded([random_adapter(dtype, (1, 8, 40)) for _ in range(ADAPTERS)], dtype)
    static = StaticPlan(loaded.slab, rows=rows, rank=64)
    tiles = static.batch.memo[host.StepWork, loaded.slab].tiles
    address = tiles.data_ptr()
    batches = [[0] * rows, [None] * rows, [row % ADAPTERS for row in range(rows)], [5, None, 7]]
    for step, owner in enumerate(batches):
        if step == 2:
            loaded.slab.free(loaded.slots[1])
            loaded.adapters[1] = random_adapter(dtype, (64,))
            loaded.slots[1] = loaded.load(loaded.adapters[1])
        static.refresh(loaded.batch(owner))
        padded = owner + [None] * (rows - len(owner))
        for site, view in zip(SITES[:2], loaded.slab.views, strict=False):
            x, y = inputs(site, rows, dtype)
            got = y.clone()
            lora(x, got, view, static.batch)
            assert_close(got, *contract(x, y, site, loaded.adapters, padded))
            assert torch.equal(got[len(owner) :], y[len(owner) :])
    assert tiles.data_ptr() == address


def test_a_graph_refuses_what_it_was_not_sized_for(loaded):
    own = loaded[torch.float32]
    large = next(i for i, deltas in enumerate(own.adapters) if max(d.a.shape[0] for d in deltas.values()) > 64)
    static = StaticPlan(own.slab, rows=4, rank=64)
    for owner in ([None] * 5, [large]):
        with pytest.raises(EngineFault, match="use the graph of a larger bucket"):
            static.refresh(own.batch(owner))


def test_a_stale_handle_is_an_error_and_never_the_next_owner():
    loaded = Loaded([random_adapter(torch.float32, absent=0)], torch.float32)
    batch, static = loaded.batch([0]), StaticPlan(loaded.slab, rows=1, rank=256)
    x, y = inputs(SITES[0], 1, torch.float32)
    lora(x, y.clone(), loaded.slab.views[0], batch)
    loaded.slab.free(loaded.slots[0])
    loaded.load(random_adapter(torch.float32))
    before = y.clone()
    for use in (lambda: lora(x, y, loaded.slab.views[0], batch), lambda: static.refresh(batch)):
        with pytest.raises(EngineFault, match="freed meanwhile"):
            use()
    assert torch.equal(y, before)


def test_wrong_tensors_and_slabs_are_errors(loaded):
    view, batch = loaded[torch.float32].slab.views[0], loaded[torch.float32].batch([0, 0])
    x, y = inputs(SITES[0], 2, torch.float32)
    for bad_x, bad_y in (
        (x.half(), y),
        (x, y.half()),
        (x.half(), y.half()),
        (x[:1], y),
        (x[:, 1:], y),
        (x, y[:, 1:]),
        (x, y.T.contiguous().T),
    ):
        with pytest.raises(EngineFault, match="contiguous rows"):
            lora(bad_x, bad_y, view, batch)
    quantized = loaded[torch.int8]
    with pytest.raises(EngineFault, match="contiguous rows"):
        lora(x, y.half(), quantized.slab.views[0], quantized.batch([0, 0]))
    other = Slab(SITES, slots=1, size=1 << 20, dtype=torch.float32, layout=ROWS)
    packed = other.pack(random_adapter(torch.float32))
    slot = other.allocate(packed.bytes)
    other.load(slot, packed)
    with pytest.raises(EngineFault, match="another backend's layout"):
        lora(x, y, other.views[0], Batch.of([(slot, 2)]))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 70), st.integers(0, 256))),
    st.sampled_from([1, 16, 64]),
    st.sampled_from([16, 64]),
)
def test_tiles_cover_live_rows_and_ranks_once_and_nothing_else(runs, rows, ranks_per_tile):
    starts = np.cumsum([0, *(gap + count for _, gap, count, _ in runs)])
    segments = [(slot, end - count, end) for (slot, _, count, _), (_, end) in zip(runs, pairwise(starts), strict=True)]
    ranks = np.array([rank for *_, rank in runs], dtype=np.int64)
    first, more = host.tile_list(np.array(segments, dtype=np.int32).reshape(-1, 3), ranks, rows, ranks_per_tile)
    assert not first[:, 3].any()
    assert more[:, 3].all()
    expected = {
        (slot, row, rank): 1
        for (slot, start, end), limit in zip(segments, ranks.tolist(), strict=True)
        for row, rank in product(range(start, end), range(0, limit, ranks_per_tile))
    }
    covered = {}
    for slot, start, end, rank in np.concatenate([first, more]).tolist():
        assert 0 < end - start <= rows
        for row in range(start, end):
            covered[slot, row, rank] = covered.get((slot, row, rank), 0) + 1
    assert covered == expected


@given(
    st.integers(1, 40_000), st.sampled_from([2, 4]), st.sampled_from([plan for _, _, plan in plans.TABLE]),
    st.integers(1, 10_000),
)  # fmt: skip
def test_the_steps_of_all_splits_cover_the_sum(d_in, itemsize, plan, programs):
    steps = plans.steps(d_in, itemsize, plan, programs)
    launch = plans.shrink(plan, itemsize, steps)
    depth = launch.constants["DEPTH"]
    splits = -(-d_in // (depth * steps))
    assert steps.bit_count() == 1
    assert splits * steps * depth >= d_in
    assert splits <= plan.shrink.splits == plans.expand(plan).constants["SPLITS"]


def test_the_bench_checks_run_on_a_cpu_and_detect_an_error(monkeypatch):
    arguments = {"device": "cpu", "sites": SITES[:1], "dtypes": [torch.float32, torch.float16]}
    runs = [[(0, 1), (None, 1), (2, 2)], [(3, 20), (1, 2)]]
    checks = list(cuda.check(runs=runs, **arguments))
    assert [check.dtype for check in checks] == ["torch.float32"] * 2 + ["torch.float16"] * 2
    assert all(check.passed for check in checks), checks
    monkeypatch.setattr(cuda.reference, "lora", lambda *_: None)
    assert not any(check.passed for check in cuda.check(runs=runs, **arguments))


def test_the_contenders_of_the_bench_compute_the_same():
    site, case = Site(48, ("gate", "up"), (32, 16)), cuda.Case(rows=6, adapters=3, rank=4)
    problem = cuda.random_problem(site, case, torch.float32, "cpu")
    results = []
    for contend in (
        cuda.lora_launches(problem),
        cuda.static_launches(problem),
        cuda.fused_launch(problem),
        lambda: cuda.gather_bmm(problem),
    ):
        problem.y.zero_()
        contend()
        results.append(problem.y.clone())
    assert results[0].any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_the_floor_counts_live_adapters_and_the_rows_once():
    site, case = Site(48, ("gate", "up"), (32, 16)), cuda.Case(rows=6, adapters=3, rank=4)
    problem = cuda.random_problem(site, case, torch.bfloat16, "cpu")
    moved = (*problem.a, *problem.b, problem.x, problem.y, problem.y)
    assert cuda.floor_bytes(site, case, 2) == sum(tensor.nbytes for tensor in moved)


def test_the_bench_has_a_fused_time_only_where_the_kernel_could_run():
    site = Site(48, ("o",), (32,))
    assert cuda.fused_launch(cuda.random_problem(site, cuda.Case(20, 1, 4), torch.float32, "cpu")) is None
    assert cuda.fused_launch(cuda.random_problem(site, cuda.Case(2, 2, 17), torch.float32, "cpu")) is None
