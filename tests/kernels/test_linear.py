"""The base's linears of every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault

from .conftest import NATIVE, open_backend
from .oracle import TOLERANCE, assert_near


@pytest.mark.parametrize(("d_out", "d_in"), [(960, 576), (576, 1536), (1, 1), (33, 7), (48, 64), (31, 129)])
def test_any_number_of_rows(ops, dtype, d_out, d_in):
    weight = (torch.randn(d_out, d_in) / d_in**0.5).to(dtype)
    packed = ops.pack(weight)
    for rows in (0, 1, 2, 5, 11, 12, 13, 31, 64, 200):
        x = torch.randn(rows, d_in).to(dtype)
        assert_near(ops.linear(x, packed), x.double() @ weight.double().T, TOLERANCE[dtype])


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(1, 40), d_out=st.integers(1, 100), d_in=st.integers(1, 200))
def test_random_shapes(data, rows, d_out, d_in):
    ops = open_backend(data.draw(st.sampled_from(NATIVE)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    # Outputs are about 1: a single small one among large products does not measure their rounding.
    weight = (torch.randn(d_out, d_in) / d_in**0.5).to(dtype)
    x = torch.randn(rows, d_in + 9).to(dtype)[:, 3 : 3 + d_in]
    assert_near(ops.linear(x, ops.pack(weight)), x.double() @ weight.double().T, TOLERANCE[dtype])


def test_rows_of_the_matrix(ops, dtype):
    weight = torch.randn(70, 37).to(dtype)
    tokens = torch.tensor([0, 69, 31, 32, 33, 5, 5])
    assert torch.equal(ops.embed(tokens, ops.pack(weight)), weight[tokens])
    assert torch.equal(ops.embed(tokens[::2], ops.pack(weight)), weight[tokens[::2]])
    assert ops.embed(tokens[:0], ops.pack(weight)).shape == (0, 37)


def test_a_token_outside_the_matrix_is_refused(native):
    weight = native.pack(torch.randn(70, 37))
    for token in (70, -1):
        with pytest.raises(EngineFault, match="matrix of 70"):
            native.embed(torch.tensor([0, token]), weight)


def test_nan_stays_in_its_row_for_odd_widths(native, dtype):
    # The last input of an odd row has no partner: the next row's first must not take its place.
    weight = native.pack(torch.randn(20, 37).to(dtype))
    x = torch.randn(3, 37).to(dtype)
    clean = native.linear(x, weight)
    x[1] = torch.nan
    got = native.linear(x, weight)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_other_dtypes_and_shapes_are_refused(native):
    weight = native.pack(torch.randn(20, 37))
    for x in (torch.randn(2, 37).half(), torch.randn(2, 36), torch.randn(2, 37).bfloat16(), torch.randn(37, 2).T):
        with pytest.raises(EngineFault):
            native.linear(x, weight)
