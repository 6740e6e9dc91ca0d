"""The products of a base, on processors with and without instructions for bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from loramill.kernels import products
from loramill.kernels.products import frozen_linear, linear, product


@pytest.fixture(params=[True, False], ids=["without bfloat16", "as this processor is"])
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(products, "_lacks_bfloat16", lambda: True)


def random_rows(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_the_exact_ones_rounded(rows: int, bias: bool) -> None:
    x, weight = random_rows(rows, 96, seed=1), random_rows(64, 96, seed=2)
    added = random_rows(1, 64, seed=3)[0] if bias else None
    y, dx = linear(x, weight, added), product(random_rows(rows, 64, seed=4), weight)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert (y.dtype, y.shape, dx.dtype, dx.shape) == (torch.bfloat16, (rows, 64), torch.bfloat16, (rows, 96))
    # A result in bfloat16 has 8 significant bits.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
    exact = random_rows(rows, 64, seed=4).double() @ weight.double()
    torch.testing.assert_close(dx.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("d_in", "d_out"), [(576, 1536), (1536, 576), (64, 64), (16, 32)])
def test_a_row_has_the_same_bits_whatever_the_other_rows_are(
    d_in: int, d_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: True)
    monkeypatch.setattr(products, "_ELEMENTS", 100_000)  # several slices of the larger weights
    x, weight, dy = random_rows(200, d_in, seed=1), random_rows(d_out, d_in, seed=2), random_rows(200, d_out, seed=3)
    y, dx = linear(x, weight), product(dy, weight)
    for start, stop in ((0, 1), (7, 9), (100, 103), (150, 165), (20, 120)):
        assert torch.equal(linear(x[start:stop], weight), y[start:stop])
        assert torch.equal(product(dy[start:stop], weight), dx[start:stop])


def test_little_memory_is_taken_for_what_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: True)
    x, weight, dy = random_rows(1024, 1024, seed=1), random_rows(8192, 1024, seed=2), random_rows(1024, 8192, seed=3)
    for compute in (lambda: linear(x, weight), lambda: product(dy, weight)):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = compute()
        peak = total = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                peak = max(peak, total)
        assert peak - result.nbytes <= 10 * 2**20  # the weight in float32: 32 MiB


@pytest.mark.usefixtures("lacking")
def test_the_gradient_is_in_x_alone() -> None:
    x, weight = random_rows(6, 32, seed=1).view(2, 3, 32).requires_grad_(), random_rows(16, 32, seed=2)
    y = frozen_linear(x, weight)
    assert y.shape == (2, 3, 16)
    dy = random_rows(6, 16, seed=3)
    y.backward(dy.view(2, 3, 16))
    assert x.grad is not None
    assert torch.equal(x.grad.view(6, 32), product(dy, weight))


def test_float32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: True)
    x, weight = random_rows(1, 32, 1, torch.float32), random_rows(16, 32, 2, torch.float32)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
