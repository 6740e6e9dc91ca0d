"""`grouped_lora` against a row-by-row reference and finite differences: bases, neighbors in a batch, dropout."""

import functools
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.kernels.batch import Batch
from loramill.kernels.training import Trainable, dropout_seed, grouped_lora

from .training_oracle import ONE, SLOTS, THREE, TWO, assert_near, assert_same_bits, gradients, row_by_row, trainable


@settings(max_examples=200)
@given(
    counts=st.lists(st.tuples(st.sampled_from([None, *SLOTS]), st.integers(0, 5)), min_size=1, max_size=8),
    ranks=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    dropouts=st.lists(st.sampled_from([0.0, 0.25, 0.9]), min_size=6, max_size=6),
    targeted=st.sets(st.sampled_from(SLOTS)),
    with_bias=st.booleans(),
    sizes=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    seed=st.integers(0, 2**32),
)
def test_any_batch_equals_its_rows_one_by_one(counts, ranks, dropouts, targeted, with_bias, sizes, seed):
    torch.manual_seed(seed)
    d_in, d_out = sizes
    batch = Batch.of(counts)
    adapters = {
        slot: trainable(r, d_in, d_out, torch.float64, dropout=p, seed=seed + slot.index)
        for slot, r, p in zip(SLOTS, ranks, dropouts, strict=True)
        if slot in targeted
    }
    x = torch.randn(batch.rows, d_in, dtype=torch.float64, requires_grad=True)
    base, dy = torch.randn(d_out, d_in, dtype=torch.float64), torch.randn(batch.rows, d_out, dtype=torch.float64)
    bias = torch.randn(d_out, dtype=torch.float64) if with_bias else None
    got = gradients(grouped_lora, x, base, adapters, batch, dy, bias=bias)
    if batch.rows == 0:
        assert got["y"].shape == (0, d_out)
        return
    expected = gradients(row_by_row, x, base, adapters, batch, dy, bias=bias)
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), f"gradient of {name}"
        if value is not None:
            assert_near(got[name], value, 1e-10, name)


@pytest.mark.parametrize(
    ("d_in", "d_out", "ranks"), [(37, 29, (1, 256, 7)), (128, 61, (64, 3, 100)), (5, 3, (1, 2, 3))]
)
def test_float32_agrees_within_rounding(d_in, d_out, ranks):
    adapters = {slot: trainable(r, d_in, d_out, dropout=0.2, seed=r) for slot, r in zip(SLOTS, ranks, strict=False)}
    batch = Batch.of([(ONE, 30), (None, 3), (TWO, 41), (ONE, 1), (THREE, 7)])
    x, dy = torch.randn(82, d_in, requires_grad=True), torch.randn(82, d_out)
    base = torch.randn(d_out, d_in)
    got, expected = (gradients(f, x, base, adapters, batch, dy) for f in (grouped_lora, row_by_row))
    for name, value in expected.items():
        assert_near(got[name], value, 1e-5, name)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(p):
    base, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    batch = Batch.of([(ONE, 2), (None, 1), (TWO, 3), (ONE, 1)])
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    one, two = trainable(2, 4, 5, torch.float64), trainable(3, 4, 5, torch.float64)

    def function(x, a1, b1, a2, b2):
        adapters = {ONE: Trainable(a1, b1, 0.7, p, seed=1), TWO: Trainable(a2, b2, 1.3, p, seed=2)}
        return grouped_lora(x, base, adapters, batch, bias)

    assert torch.autograd.gradcheck(function, (x, one.a, one.b, two.a, two.b))


# The base


def test_rows_without_an_adapter_are_the_bases_alone():
    batch = Batch.of([(None, 3), (ONE, 4), (TWO, 2), (None, 1), (THREE, 5)])
    x, base, bias = torch.randn(15, 37), torch.randn(29, 37), torch.randn(29)
    y = grouped_lora(x, base, {ONE: trainable(4, 37, 29), THREE: trainable(5, 37, 29)}, batch, bias)
    alone = F.linear(x, base, bias)
    untouched = [0, 1, 2, 7, 8, 9]
    assert_same_bits(y[untouched], alone[untouched], "rows of the base, and of an adapter without a target here")
    assert not torch.isclose(y, alone).all(dim=1)[[3, 4, 5, 6, 10, 11, 12, 13, 14]].any()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_bfloat16(adapter_dtype):
    adapters = {slot: trainable(r, 96, 72, adapter_dtype, dropout=0.1, seed=r) for slot, r in ((ONE, 8), (TWO, 64))}
    batch = Batch.of([(ONE, 20), (None, 2), (TWO, 30), (ONE, 9)])
    x = torch.randn(61, 96).bfloat16().requires_grad_()
    base, dy = torch.randn(72, 96).bfloat16(), torch.randn(61, 72).bfloat16()
    got = gradients(grouped_lora, x, base, adapters, batch, dy)
    exact = {slot: Trainable(t.a.double(), t.b.double(), t.scale, t.dropout, t.seed) for slot, t in adapters.items()}
    expected = gradients(row_by_row, x.detach().double().requires_grad_(), base.double(), exact, batch, dy.double())
    for name, value in expected.items():
        is_adapters = name not in "xy"
        assert got[name].dtype == (adapter_dtype if is_adapters else torch.bfloat16), name
        # Products in float32 of exact bfloat16 inputs: an adapter's own gradients lose nothing.
        narrow = adapter_dtype == torch.bfloat16 or not is_adapters
        assert_near(got[name], value, 2e-2 if narrow else 1e-5, name)


def test_a_delta_of_wider_dtype_is_rounded_with_the_sum():
    batch = Batch.of([(ONE, 50)])
    x, base = torch.randn(50, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    adapter = trainable(16, 64, 48)
    y = grouped_lora(x, base, {ONE: adapter}, batch)
    delta = x.float() @ adapter.a.T @ adapter.b.T * adapter.scale
    once = (F.linear(x, base).float() + delta).bfloat16()
    assert (y != once).float().mean() < 0.01, "two orders of the same float32 sums may straddle a tie, but rarely"
    assert (F.linear(x, base) + delta.bfloat16() != y).float().mean() > 0.05, (
        "the inputs don't show whether rounding happens once or twice"
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_nf4(dtype, nested):
    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.nn.Params4bit(torch.randn(96, 128).to(dtype), quant_type="nf4", compress_statistics=nested).to("cpu")
    assert weight.dtype == torch.uint8
    assert weight.quant_state.nested == nested
    base = functools.partial(bnb.functional.dequantize_4bit, weight.data, weight.quant_state)
    adapters = {ONE: trainable(8, 128, 96, dropout=0.2, seed=1), TWO: trainable(31, 128, 96)}
    batch = Batch.of([(ONE, 9), (None, 4), (TWO, 12), (ONE, 2)])
    x, dy = torch.randn(27, 128).to(dtype).requires_grad_(), torch.randn(27, 96).to(dtype)
    got = gradients(grouped_lora, x, base, adapters, batch, dy)
    expected = gradients(row_by_row, x, base(), adapters, batch, dy)
    for name, value in expected.items():
        assert_near(got[name], value, 1e-5 if dtype == torch.float32 else 3e-2, name)
    module = bnb.nn.LinearNF4(128, 96, bias=False)
    module.weight = weight
    assert_near(got["y"][9:13], module(x)[9:13], 1e-5 if dtype == torch.float32 else 3e-2, "rows of the base")


def test_a_weight_that_is_computed_is_not_kept():
    weight, made = torch.randn(6, 8), []

    def make():
        fresh = weight.clone()
        made.append(weakref.ref(fresh))
        return fresh

    x = torch.randn(4, 8, requires_grad=True)
    y = grouped_lora(x, make, {ONE: trainable(2, 8, 6)}, Batch.of([(ONE, 4)]))
    assert [ref() for ref in made] == [None]
    y.sum().backward()
    assert [ref() for ref in made] == [None, None]


# Neighbors


def alone_and_among(adapter, x, dy, neighbors, base):
    """The adapter's y and gradients by itself, and among `neighbors` (pairs of slot and rows around every row)."""
    rows = len(x)
    alone = gradients(grouped_lora, x, base, {ONE: adapter}, Batch.of([(ONE, rows)]), dy)
    counts = list(itertools.chain.from_iterable([(ONE, 1), *neighbors] for _ in range(rows)))
    batch = Batch.of(counts)
    own = torch.tensor([row for run in batch.runs if run.slot == ONE for row in range(batch.rows)[run.rows]])
    wide = torch.randn(batch.rows, x.shape[1]).index_copy(0, own, x.detach()).requires_grad_()
    wide_dy = torch.randn(batch.rows, dy.shape[1]).index_copy(0, own, dy)
    others = {slot: trainable(5, x.shape[1], dy.shape[1], dropout=0.5, seed=9) for slot in (TWO, THREE)}
    among = gradients(grouped_lora, wide, base, {**others, ONE: adapter}, batch, wide_dy)
    return alone, {"0.a": among["0.a"], "0.b": among["0.b"], "y": among["y"][own], "x": among["x"][own]}


@pytest.mark.parametrize("neighbors", [[(None, 1)], [(TWO, 2)], [(TWO, 1), (None, 3), (THREE, 1)]])
def test_an_adapter_trains_the_same_among_any_neighbors(neighbors):
    adapter = trainable(8, 64, 48, dropout=0.5, seed=3)
    x, dy, base = torch.randn(11, 64, requires_grad=True), torch.randn(11, 48), torch.randn(48, 64)
    alone, among = alone_and_among(adapter, x, dy, neighbors, base)
    assert_same_bits(among["0.a"], alone["0.a"], "gradient of a")
    assert_same_bits(among["0.b"], alone["0.b"], "gradient of b")
    # The base's products may group more rows differently; a wrong mask would be off by a whole element.
    assert_near(among["y"], alone["y"], 1e-5, "y")
    assert_near(among["x"], alone["x"], 1e-5, "gradient of x")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "b", "rows", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_with_their_adapter(where, poison, dtype):
    def run(poisoned, *, present=True):
        adapters = dict(kept)
        wide, narrow = x.detach().clone(), dy.clone()
        if present:
            adapters[TWO] = bad
        if poisoned:
            a, b = bad.a.detach().clone(), bad.b.detach().clone()
            {"a": a, "b": b, "rows": wide[own], "gradient": narrow[own]}[where].view(-1)[5] = poison
            adapters[TWO] = Trainable(a.requires_grad_(), b.requires_grad_(), 1.0, 0.3, 2)
        return gradients(grouped_lora, wide.requires_grad_(), base, adapters, batch, narrow)

    own = slice(6, 15)
    batch = Batch.of([(ONE, 4), (None, 2), (TWO, 9), (THREE, 5), (ONE, 3)])
    others = [row for row in range(23) if row not in range(6, 15)]
    kept = {ONE: trainable(8, 40, 32, dropout=0.3, seed=1), THREE: trainable(20, 40, 32)}
    bad = trainable(8, 40, 32, scale=1.0, dropout=0.3, seed=2)
    x, dy, base = torch.randn(23, 40).to(dtype), torch.randn(23, 32).to(dtype), torch.randn(32, 40).to(dtype)
    poisoned, healthy, absent = run(True), run(False), run(False, present=False)
    hit = [
        t for t in (poisoned["y"][own], poisoned["x"][own], poisoned["1.a"], poisoned["1.b"]) if not t.isfinite().all()
    ]
    assert hit, "the poison did nothing"
    for other in (healthy, absent):
        for name in ("0.a", "0.b", "2.a", "2.b"):
            assert_same_bits(poisoned[name], other[name], f"gradient of {name}")
        assert_same_bits(poisoned["y"][others], other["y"][others], "y of the others")
        assert_same_bits(poisoned["x"][others], other["x"][others], "gradient of x of the others")


# Dropout


def dropped(p, seed, rows=256, d=64, dtype=torch.float32):
    """Dropout of ones, and the gradient of its input: the adapter is the identity and the base 0."""
    eye = torch.eye(d)
    x = torch.ones(rows, d, dtype=dtype, requires_grad=True)
    y = grouped_lora(
        x, torch.zeros(d, d, dtype=dtype), {ONE: Trainable(eye, eye, 1.0, p, seed)}, Batch.of([(ONE, rows)])
    )
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_hides_a_fraction_p_and_keeps_the_mean(p):
    seed = torch.randint(2**62, ()).item()
    y, dx = dropped(p, seed)
    hidden = y == 0
    deviation = math.sqrt(p * (1 - p) / y.numel())
    assert abs(hidden.double().mean() - p) < 6 * deviation
    assert abs(y.double().mean() - 1) < 6 * deviation / (1 - p) + 1e-4
    torch.testing.assert_close(y[~hidden], torch.full_like(y[~hidden], 1 / (1 - p)), rtol=1e-4, atol=0)
    assert_same_bits(dx, y, "the mask of the backward")
    # Each row and column has the same fraction; neighbors within a random word are independent.
    for axis in (0, 1):
        assert (hidden.double().mean(axis) - p).abs().max() < 7 * math.sqrt(p * (1 - p) / hidden.shape[axis])
    pairs = (hidden[:, 1:] & hidden[:, :-1]).double().mean()
    assert abs(pairs - p * p) < 8 * p / math.sqrt(y.numel())


def test_the_mask_is_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first, _ = dropped(0.5, 11)
    state = torch.get_rng_state()
    again, _ = dropped(0.5, 11)
    assert_same_bits(again, first, "the same seed")
    assert_same_bits(torch.get_rng_state(), state, "torch's own generator")
    assert_same_bits(dropped(0.5, 11, dtype=torch.bfloat16)[0].float(), first, "another dtype of x")
    other, _ = dropped(0.5, 12)
    assert abs((other == first).double().mean() - 0.5) < 0.05


def test_seeds_are_those_of_adapter_step_and_site():
    names = ("acme/support", "acme/support1", "globex/'x'")
    keys = list(itertools.product(names, (0, 1, 11), ("model.layers.1.q", "model.layers.11.q", "1")))
    seeds = [dropout_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(torch.Generator().manual_seed(seed) for seed in seeds)
    assert dropout_seed("acme/support", 3, "model.layers.0.self_attn.q_proj") == 5345779790828726843
