"""Every backend against the contract's docstring, over popularity, rows, ranks, odd sizes and dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.kernels import Batch, Delta, Site, backend, lora, reference

from .conftest import BACKENDS, open_backend
from .oracle import (
    POPULARITY,
    ROWS,
    TOLERANCE,
    assert_near,
    contract,
    filled_slab,
    owners,
    random_adapter,
    random_delta,
)

ODD = Site(d_in=37, modules=("q", "k", "v"), widths=(29, 5, 11))
EVEN = Site(d_in=64, modules=("q", "k"), widths=(64, 40))
RANKS = [1, 2, 3, 8, 16, 17, 64, 128]
ADAPTERS = 12


@pytest.fixture(scope="module")
def adapters():
    torch.manual_seed(torch.seed() % 2**31)
    return {site: [random_adapter(site, RANKS, seed) for seed in range(ADAPTERS)] for site in (ODD, EVEN)}


def batch_of(slots, owner) -> Batch:
    return Batch.of((None if index is None else slots[index], 1) for index in owner)


@pytest.mark.parametrize("site", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_every_backend_keeps_the_contract(ops, dtype, adapters, site, popularity):
    slab, slots = filled_slab([site], adapters[site], dtype, ops.layout)
    for rows in ROWS:
        owner = owners(popularity, rows, ADAPTERS)
        x, y = torch.randn(rows, site.d_in).to(dtype), torch.randn(rows, sum(site.widths)).to(dtype)
        got = y.clone()
        ops.lora(x, got, slab.views[0], batch_of(slots, owner))
        assert_near(got, contract(x, y, site, adapters[site], owner, dtype), TOLERANCE[dtype])
        alone = torch.tensor([index is None for index in owner])
        assert torch.equal(got[alone], y[alone])


@settings(max_examples=40)
@given(data=st.data())
def test_random_batches(data):
    ops = open_backend(data.draw(st.sampled_from([name for name in BACKENDS if name != "reference"])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    widths = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
    site = Site(data.draw(st.integers(1, 130)), tuple("qkv"[: len(widths)]), widths)
    ranks = data.draw(st.lists(st.integers(1, 256), min_size=1, max_size=4))
    adapters = [random_adapter(site, ranks, seed) for seed in range(3)]
    counts = data.draw(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(0, 30)), max_size=8))
    owner = [index for index, count in counts for _ in range(count)]
    slab, slots = filled_slab([site], adapters, dtype, ops.layout)
    exact, exact_slots = filled_slab([site], adapters, dtype, reference.layout)
    x, y = torch.randn(len(owner), site.d_in).to(dtype), torch.randn(len(owner), sum(widths)).to(dtype)
    got, expected = y.clone(), y.float()
    ops.lora(x, got, slab.views[0], batch_of(slots, owner))
    reference.lora(x.float(), expected, exact.views[0], batch_of(exact_slots, owner))
    assert_near(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("site", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("rows", [1, 8, 33, 200])
def test_an_adapted_linear_is_the_linear_and_its_adapters(ops, dtype, adapters, site, rows):
    slab, slots = filled_slab([site], adapters[site], dtype, ops.layout)
    weight = (torch.randn(sum(site.widths), site.d_in) / site.d_in**0.5).to(dtype)
    packed = ops.pack(weight)
    x = torch.randn(rows, site.d_in).to(dtype)
    for popularity in POPULARITY:
        owner = owners(popularity, rows, ADAPTERS)
        base = x.double() @ weight.double().T
        expected = contract(x, base, site, adapters[site], owner, dtype)
        got = ops.adapted_linear(x, packed, slab.views[0], batch_of(slots, owner))
        assert_near(got, expected, TOLERANCE[dtype])
        alone = torch.tensor([index is None for index in owner])
        assert torch.equal(got[alone], ops.linear(x, packed)[alone]), "rows of the base alone"


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_int8_adapters_compute_what_their_rounded_values_do(name, adapters, rows):
    ops, dtype = open_backend(name), torch.bfloat16
    for site in (ODD, EVEN):
        slab, slots = filled_slab([site], adapters[site], torch.int8, ops.layout)
        rounded, rounded_slots = filled_slab([site], adapters[site], torch.int8, reference.layout)
        for popularity in POPULARITY:
            owner = owners(popularity, rows, ADAPTERS)
            x, y = torch.randn(rows, site.d_in).to(dtype), torch.randn(rows, sum(site.widths)).to(dtype)
            got, expected = y.clone(), y.float()
            ops.lora(x, got, slab.views[0], batch_of(slots, owner))
            reference.lora(x.float(), expected, rounded.views[0], batch_of(rounded_slots, owner))
            assert_near(got, expected, TOLERANCE[dtype])
    assert slab.bytes < 0.6 * filled_slab([EVEN], adapters[EVEN], dtype, ops.layout)[0].bytes


def test_rounding_to_int8_errs_by_about_a_hundredth_of_the_delta(adapters):
    exact, rounded = (
        filled_slab([EVEN], adapters[EVEN], dtype, reference.layout) for dtype in (torch.float32, torch.int8)
    )
    x = torch.randn(ADAPTERS, 64)
    deltas = []
    for slab, slots in (exact, rounded):
        y = torch.zeros(ADAPTERS, 104)
        reference.lora(x, y, slab.views[0], batch_of(slots, range(ADAPTERS)))
        deltas.append(y)
    assert (deltas[1] - deltas[0]).norm() < 0.015 * deltas[0].norm()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_broken_rank_shows_through_int8_too(native, poison):
    bad = random_delta(6, 37, 29)
    bad.a[3, 5] = poison
    slab, (slot,) = filled_slab([ODD], [{"q": bad}], torch.int8, native.layout)
    x, y = torch.randn(2, 37).bfloat16(), torch.randn(2, 45).bfloat16()
    got = y.clone()
    native.lora(x, got, slab.views[0], Batch.of([(slot, 1), (None, 1)]))
    assert not got[0, :29].isfinite().any()
    assert torch.equal(got[1], y[1])


def test_views_are_read_and_written_in_place(ops, dtype, adapters):
    slab, slots = filled_slab([ODD], adapters[ODD], dtype, ops.layout)
    wide, x = torch.randn(4, 60).to(dtype), torch.randn(4, 90).to(dtype)[:, 50:87]
    before = wide.clone()
    ops.lora(x, wide[:, 7:52], slab.views[0], Batch.of([(slots[2], 4)]))
    expected = contract(x, before[:, 7:52], ODD, adapters[ODD], [2] * 4, dtype)
    assert_near(wide[:, 7:52], expected, TOLERANCE[dtype])
    assert torch.equal(wide[:, :7], before[:, :7])
    assert torch.equal(wide[:, 52:], before[:, 52:])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [1, 20])
def test_an_adapter_of_nan_touches_only_its_own_rows(ops, dtype, adapters, poison, rows):
    sizes = dict(zip(ODD.modules, ODD.widths, strict=True))
    bad = {m: Delta(torch.full((3, 37), poison), torch.full((w, 3), poison), torch.ones(w)) for m, w in sizes.items()}
    good = {m: random_delta(3, 37, w) for m, w in sizes.items()}
    slab, (one, two) = filled_slab([ODD], [good, bad], dtype, ops.layout)
    weight = ops.pack(torch.randn(45, 37).to(dtype))
    x, y = torch.randn(5 * rows, 37).to(dtype), torch.randn(5 * rows, 45).to(dtype)
    mixed = Batch.of([(one, 2 * rows), (two, rows), (None, 2 * rows)])
    healthy = Batch.of([(one, 2 * rows), (None, 3 * rows)])
    results = []
    for batch in (mixed, healthy):
        got = y.clone()
        ops.lora(x, got, slab.views[0], batch)
        results.append((got, ops.adapted_linear(x, weight, slab.views[0], batch)))
    bad_rows = torch.arange(2 * rows, 3 * rows)
    keep = torch.tensor([row for row in range(5 * rows) if row not in bad_rows])
    for with_bad, without in zip(*results, strict=True):
        assert not with_bad[bad_rows].isfinite().any()
        assert torch.equal(with_bad[keep], without[keep])


def test_nan_stays_in_its_row(ops, dtype, adapters):
    slab, slots = filled_slab([ODD], adapters[ODD], dtype, ops.layout)
    weight = ops.pack(torch.randn(45, 37).to(dtype))
    x = torch.randn(9, 37).to(dtype)
    batch = Batch.of([(slots[0], 3), (None, 2), (slots[1], 1), (slots[2], 3)])
    clean = ops.adapted_linear(x, weight, slab.views[0], batch)
    for row in range(9):
        broken = x.clone()
        broken[row] = torch.nan
        got = ops.adapted_linear(broken, weight, slab.views[0], batch)
        assert got[row].isnan().all()
        others = torch.arange(9) != row
        assert torch.equal(got[others], clean[others])


def test_memory_around_an_adapter_is_never_read(ops, dtype):
    # The arena is poisoned outside of the adapter, except for the padding between its parts.
    sizes = dict(zip(ODD.modules, ODD.widths, strict=True))
    adapter = {m: random_delta(5, 37, w, gain=True) for m, w in sizes.items()}
    slab, (slot,) = filled_slab([ODD], [adapter], dtype, ops.layout)
    used = slab.bytes
    slab.arena[used:].view(torch.int8).fill_(-1)
    x, y = torch.randn(20, 37).to(dtype), torch.randn(20, 45).to(dtype)
    got = y.clone()
    ops.lora(x, got, slab.views[0], Batch.of([(slot, 20)]))
    assert_near(got, contract(x, y, ODD, [adapter], [0] * 20, dtype), TOLERANCE[dtype])


def test_a_stale_handle_is_an_error_and_never_the_next_owner(ops, dtype, adapters):
    slab, slots = filled_slab([ODD], adapters[ODD][:1], dtype, ops.layout)
    old = slots[0]
    stale = Batch.of([(old, 1)])
    x, y = torch.randn(1, 37).to(dtype), torch.zeros(1, 45, dtype=dtype)
    ops.lora(x, y.clone(), slab.views[0], stale)
    slab.free(old)
    packed = slab.pack(adapters[ODD][1])
    new = slab.allocate(packed.bytes)
    slab.load(new, packed)
    assert new.index == old.index
    for batch in (stale, Batch.of([(old, 1)])):
        with pytest.raises(EngineFault, match="freed meanwhile"):
            ops.lora(x, y, slab.views[0], batch)
    assert not y.any()
    ops.lora(x, y, slab.views[0], Batch.of([(new, 1)]))
    assert y.any()


def test_shapes_and_dtypes_that_do_not_fit_are_refused(native, adapters):
    slab, slots = filled_slab([ODD], adapters[ODD][:1], torch.float32, native.layout)
    batch = Batch.of([(slots[0], 2)])
    for x, y in [
        (torch.randn(2, 37).bfloat16(), torch.randn(2, 45).bfloat16()),
        (torch.randn(2, 37), torch.randn(2, 45).bfloat16()),
        (torch.randn(3, 37), torch.randn(3, 45)),
        (torch.randn(2, 36), torch.randn(2, 45)),
        (torch.randn(2, 37), torch.randn(2, 44)),
        (torch.randn(37, 2).T, torch.randn(2, 45)),
    ]:
        before = y.clone()
        with pytest.raises(EngineFault, match="they must be"):
            native.lora(x, y, slab.views[0], batch)
        assert torch.equal(y, before)


def test_the_same_bits_every_time(ops, dtype, adapters):
    slab, slots = filled_slab([EVEN], adapters[EVEN], dtype, ops.layout)
    x, weight = torch.randn(40, 64).to(dtype), ops.pack(torch.randn(104, 64).to(dtype))
    batch = batch_of(slots, owners("uniform", 40, ADAPTERS))
    first = ops.adapted_linear(x, weight, slab.views[0], batch)
    assert all(torch.equal(first, ops.adapted_linear(x, weight, slab.views[0], batch)) for _ in range(3))


@pytest.mark.parametrize("site", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(native, dtype, adapters, site, popularity):
    slab, slots = filled_slab([site], adapters[site], dtype, native.layout)
    weight = native.pack(torch.randn(sum(site.widths), site.d_in).to(dtype))
    for rows in (7, 33, 130):
        owner = owners(popularity, rows, ADAPTERS)
        x, batch = torch.randn(rows, site.d_in).to(dtype), batch_of(slots, owner)
        together = native.adapted_linear(x, weight, slab.views[0], batch)
        in_two_steps = native.linear(x, weight)
        native.lora(x, in_two_steps, slab.views[0], batch)
        assert torch.equal(together, in_two_steps)
        for row in range(0, rows, 3):
            alone = native.adapted_linear(
                x[row : row + 1], weight, slab.views[0], batch_of(slots, owner[row : row + 1])
            )
            assert torch.equal(alone[0], together[row])


def test_the_chosen_backend_computes_lora(adapters):
    slab, slots = filled_slab([ODD], adapters[ODD], torch.float32, backend().layout)
    x, y = torch.randn(6, 37), torch.randn(6, 45)
    owner = [0, 0, None, 1, 2, 2]
    got = y.clone()
    lora(x, got, slab.views[0], batch_of(slots, owner))
    assert_near(got, contract(x, y, ODD, adapters[ODD], owner, torch.float32), TOLERANCE[torch.float32])
