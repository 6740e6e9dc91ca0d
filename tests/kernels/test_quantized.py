"""Weights in few bits: every backend against the same matrix written out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.kernels import Batch, Quantized, Site

from .conftest import BACKENDS, NATIVE, open_backend
from .oracle import TOLERANCE, assert_near, contract, filled_slab, owners, random_adapter

SHAPES = [(96, 128), (48, 64), (45, 37), (33, 7), (31, 129), (1, 1), (70, 12), (40, 1152)]
ROWS = (0, 1, 2, 7, 33, 128, 200)
FUSED = Site(d_in=64, modules=("q", "k", "v"), widths=(64, 32, 40))
ODD = Site(d_in=37, modules=("q", "k", "v"), widths=(29, 5, 11))
RANKS = [1, 3, 8, 17, 64]
ADAPTERS = 8


@pytest.fixture(params=[8, 4], ids=["int8", "levels"])
def bits(request):
    return request.param


def random_matrix(d_out: int, d_in: int, bits: int, group: int | None = None) -> Quantized:
    scales = (torch.rand(d_out, d_in // (group or d_in)) + 0.1) / d_in**0.5
    if bits == 8:
        return Quantized(torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8), None, scales / 64)
    return Quantized(torch.randint(16, (d_out, d_in), dtype=torch.uint8), torch.randn(16), scales)


def group_of(d_in: int) -> int:
    return next(group for group in (64, 4, d_in) if d_in % group == 0)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_products_are_those_of_the_rounded_values(ops, dtype, bits, d_out, d_in):
    for group in {d_in, group_of(d_in)}:
        matrix = random_matrix(d_out, d_in, bits, group)
        packed, plain = ops.pack_quantized(matrix, dtype), ops.pack(matrix.values(dtype))
        for rows in ROWS:
            x = torch.randn(rows, d_in).to(dtype)
            got = ops.linear(x, packed)
            assert torch.equal(got, ops.linear(x, plain))
            assert_near(got, x.double() @ matrix.values(dtype).double().T, TOLERANCE[dtype])


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(1, 40), d_out=st.integers(1, 100), fours=st.integers(1, 50))
def test_random_shapes(data, rows, d_out, fours):
    ops = open_backend(data.draw(st.sampled_from([name for name in BACKENDS if name != "reference"])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    groups = data.draw(st.sampled_from([n for n in range(1, fours + 1) if fours % n == 0]))
    d_in = 4 * fours - (data.draw(st.integers(0, 3)) if groups == 1 else 0)
    matrix = random_matrix(d_out, d_in, data.draw(st.sampled_from([4, 8])), d_in // groups)
    x = torch.randn(rows, d_in + 9).to(dtype)[:, 3 : 3 + d_in]
    got = ops.linear(x, ops.pack_quantized(matrix, dtype))
    assert torch.equal(got, ops.linear(x, ops.pack(matrix.values(dtype))))


def test_values_by_the_contract(bits):
    matrix = random_matrix(5, 12, bits, 4)
    for output in range(5):
        for i in range(12):
            code = matrix.codes[output, i]
            number = code.float() if matrix.levels is None else matrix.levels[int(code)]
            assert matrix.values(torch.float32)[output, i] == number * matrix.scales[output, i // 4]
    assert torch.equal(matrix.values(torch.bfloat16), matrix.values(torch.float32).bfloat16())


def test_rows_of_the_matrix(ops, dtype, bits):
    for d_in in (37, 128):
        matrix = random_matrix(70, d_in, bits, group_of(d_in))
        tokens = torch.tensor([0, 69, 31, 32, 33, 5, 5])
        packed = ops.pack_quantized(matrix, dtype)
        assert torch.equal(ops.embed(tokens, packed), matrix.values(dtype)[tokens])
        assert ops.embed(tokens[:0], packed).shape == (0, d_in)


@pytest.mark.parametrize("site", [FUSED, ODD], ids=["fused", "odd"])
def test_adapters_on_top(ops, dtype, bits, site):
    adapters = [random_adapter(site, RANKS, seed) for seed in range(ADAPTERS)]
    slab, slots = filled_slab([site], adapters, dtype, ops.layout)
    matrix = random_matrix(sum(site.widths), site.d_in, bits)
    packed, plain = ops.pack_quantized(matrix, dtype), ops.pack(matrix.values(dtype))
    for rows in (1, 2, 7, 33, 128):
        x = torch.randn(rows, site.d_in).to(dtype)
        for popularity in ("none", "distinct", "zipf", "skewed"):
            owner = owners(popularity, rows, ADAPTERS)
            batch = Batch.of((None if index is None else slots[index], 1) for index in owner)
            got = ops.adapted_linear(x, packed, slab.views[0], batch)
            assert torch.equal(got, ops.adapted_linear(x, plain, slab.views[0], batch))
            base = x.double() @ matrix.values(dtype).double().T
            assert_near(got, contract(x, base, site, adapters, owner, dtype), TOLERANCE[dtype])


def test_a_row_has_the_same_bits_alone_and_in_any_batch(native, dtype, bits):
    adapters = [random_adapter(FUSED, RANKS, seed) for seed in range(ADAPTERS)]
    slab, slots = filled_slab([FUSED], adapters, dtype, native.layout)
    weight = native.pack_quantized(random_matrix(136, 64, bits), dtype)
    for rows in (2, 7, 33, 128, 200):
        owner = owners("uniform", rows, ADAPTERS)
        assigned = [None if index is None else slots[index] for index in owner]
        x = torch.randn(rows, 64).to(dtype)
        together = native.adapted_linear(x, weight, slab.views[0], Batch.of((slot, 1) for slot in assigned))
        for row in range(0, rows, 5):
            alone = native.adapted_linear(x[row : row + 1], weight, slab.views[0], Batch.of([(assigned[row], 1)]))
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("threads", [2, 8])
def test_more_threads_give_the_same_bits(native, dtype, bits, threads):
    matrices = [random_matrix(d_out, d_in, bits, 64) for d_out, d_in in ((1056, 320), (320, 1088))]
    weights = [native.pack_quantized(matrix, dtype) for matrix in matrices]
    inputs = [torch.randn(24, matrix.codes.shape[1]).to(dtype) for matrix in matrices]
    before = torch.get_num_threads()
    try:
        alone = [native.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
        native.set_threads(threads)
        for _ in range(10):
            for x, weight, expected in zip(inputs, weights, alone, strict=True):
                assert torch.equal(native.linear(x, weight), expected)
    finally:
        native.set_threads(before)


def test_a_broken_scale_touches_only_its_own_output(ops, dtype, bits):
    matrix = random_matrix(70, 128, bits, 64)
    x = torch.randn(3, 128).to(dtype)
    clean = ops.linear(x, ops.pack_quantized(matrix, dtype))
    matrix.scales[33, 1] = torch.nan
    got = ops.linear(x, ops.pack_quantized(matrix, dtype))
    assert got[:, 33].isnan().all()
    others = torch.arange(70) != 33
    assert torch.equal(got[:, others], clean[:, others])


@pytest.mark.parametrize("name", ["torch", *NATIVE])
def test_memory_is_proportional_to_the_bits(name, dtype, bits):
    ops, matrix = open_backend(name), random_matrix(96, 256, bits, 64)
    assert ops.pack_quantized(matrix, dtype).data.nbytes == 96 * 256 * bits // 8


def test_parts_that_do_not_form_a_matrix_are_refused():
    good = random_matrix(6, 24, 4, 8)
    for wrong in (
        {"levels": None},
        {"levels": torch.randn(8)},
        {"levels": good.levels.double()},
        {"codes": good.codes.int()},
        {"codes": good.codes + 1 | 16},
        {"codes": good.codes[:5]},
        {"scales": good.scales.bfloat16()},
        {"scales": good.scales[:, :2].repeat(1, 6)},
        {"scales": torch.rand(6, 5)},
        {"scales": torch.rand(6, 0)},
        {"scales": torch.rand(6)},
    ):
        with pytest.raises(EngineFault, match="form a quantized matrix"):
            replace(good, **wrong)


def test_other_dtypes_and_shapes_of_x_are_refused(native, bits):
    weight = native.pack_quantized(random_matrix(20, 37, bits), torch.float32)
    for x in (torch.randn(2, 37).half(), torch.randn(2, 36), torch.randn(2, 37).bfloat16(), torch.randn(37, 2).T):
        with pytest.raises(EngineFault):
            native.linear(x, weight)
