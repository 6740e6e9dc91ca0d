"""The native kernels of training against float64, for both tiers; and an adapter's bits, alone and among others."""

import math

import pytest
import torch
from torch.nn import functional as F

from loramill.kernels import training
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.cpu import training_layers as layers
from loramill.kernels.training import Trainable, grouped_lora

BF16 = torch.bfloat16
ONE, TWO, THREE = (Slot(index, 0) for index in range(3))


@pytest.fixture
def library(native):
    return native.training_library(BF16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def near(got, exact, tolerance=0.01):
    assert got.shape == exact.shape
    assert (got.double() - exact).norm() <= tolerance * exact.norm() + 1e-6


def adapter(r, d_in, d_out, drawn, dtype=torch.float32, **rest):
    generator = torch.Generator().manual_seed(drawn)
    a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    return Trainable(a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), 1 / math.sqrt(r), dtype=BF16, **rest)


def results(x, dy, base, adapters, batch):
    """y, and the gradients of x and of every a and b."""
    x = x.clone().requires_grad_()
    y = grouped_lora(x, base, adapters, batch)
    wanted = [x, *(factor for each in adapters.values() for factor in (each.a, each.b))]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize(("d_in", "d_out"), [(37, 29), (96, 64), (130, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_products_and_gradients_are_those_of_float64(native, monkeypatch, d_in, d_out, dtype):
    monkeypatch.setattr(training, "backend", lambda _: native)
    ranks = {ONE: 1, TWO: 7, THREE: 70}
    adapters = {slot: adapter(r, d_in, d_out, r, dtype, dropout=0.2 * (r == 7), seed=r) for slot, r in ranks.items()}
    batch = Batch.of([(ONE, 5), (None, 3), (TWO, 31), (THREE, 50), (ONE, 2)])
    x, dy, base = normal(91, d_in, seed=1), normal(91, d_out, seed=2), normal(d_out, d_in, seed=3)
    exact = {
        slot: Trainable(*(each.to(BF16).double() for each in (t.a, t.b)), t.scale, t.dropout, t.seed)
        for slot, t in adapters.items()
    }
    found = results(x, dy, base, adapters, batch)
    for got, expected in zip(found, results(x.double(), dy.double(), base.double(), exact, batch), strict=True):
        near(got, expected)
    assert all(each.dtype == dtype for each in found[2:])


@pytest.mark.parametrize("threads", [1, 3])
def test_an_adapter_gets_the_bits_that_it_gets_alone(native, monkeypatch, threads):
    monkeypatch.setattr(training, "backend", lambda _: native)
    before = torch.get_num_threads()
    base, own = normal(96, 128, seed=3), adapter(12, 128, 96, 5, dropout=0.1, seed=9)
    x, dy = normal(64, 128, seed=1), normal(64, 96, seed=2)
    try:
        alone = results(x, dy, base, {ONE: own}, Batch.of([(ONE, 64)]))
        torch.set_num_threads(threads)
        others = {TWO: adapter(70, 128, 96, 6), THREE: adapter(3, 128, 96, 7)}
        batch = Batch.of([(TWO, 40), (ONE, 64), (None, 8), (THREE, 100)])
        wide, back = (torch.cat([normal(40, each.shape[1]), each, normal(108, each.shape[1])]) for each in (x, dy))
        among = results(wide, back, base, {ONE: own, **others}, batch)
    finally:
        torch.set_num_threads(before)
        native.set_threads(before)
    rows = slice(40, 104)
    for got, expected in zip([among[0][rows], among[1][rows], *among[2:4]], alone, strict=True):
        assert torch.equal(got, expected)


def test_weights_that_need_more_room_than_one_call_has(native, monkeypatch):
    monkeypatch.setattr(training, "backend", lambda _: native)
    adapters = {slot: adapter(64, 8, 20_000, seed) for seed, slot in enumerate((ONE, TWO, THREE))}
    x, dy, base = normal(12, 8, seed=1), normal(12, 20_000, seed=2), normal(20_000, 8, seed=3)
    together = results(x, dy, base, adapters, Batch.of([(ONE, 4), (TWO, 4), (THREE, 4)]))
    alone = results(x[8:], dy[8:], base, {THREE: adapters[THREE]}, Batch.of([(THREE, 4)]))
    assert all(map(torch.equal, [each[8:] for each in together[:2]] + together[6:], alone))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("d", [24, 576])
def test_a_norm_and_its_gradient(library, offset, d):
    x, weight, dy = normal(7, d), normal(d, seed=1), normal(7, d, seed=2)
    exact = x.double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + offset)
    y, factors = layers.rms_norm(library, x, weight, offset, 1e-5)
    near(y, expected.detach())
    dx = layers.rms_norm_gradient(library, dy, x, weight, factors, offset)
    near(dx, *torch.autograd.grad(expected, exact, dy.double()))


@pytest.mark.parametrize("shape", [(3, 21), (5, 1536)])
def test_a_gated_product_and_its_gradients(library, shape):
    gate, up, dy = (normal(*shape, seed=seed) * 4 for seed in range(3))
    exact = [each.double().requires_grad_() for each in (gate, up)]
    expected = F.silu(exact[0]) * exact[1]
    near(layers.gated(library, gate, up), expected.detach())
    found = layers.gated_gradients(library, dy, gate, up)
    for got, each in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        near(got, each)


@pytest.mark.parametrize("rows_of_angles", [1, 2])
def test_positions_are_turned_and_turned_back(library, rows_of_angles):
    x, angles = normal(2, 5, 3, 24), torch.randn(rows_of_angles, 5, 12).repeat(1, 1, 2)
    cos, sin = (each.to(BF16) for each in (angles.cos(), angles.sin()))
    wide = x.double()
    half = torch.cat([-wide[..., 12:], wide[..., :12]], dim=-1)
    expected = wide * cos.double()[:, :, None] + half * sin.double()[:, :, None]
    turned = layers.turned(library, x, cos, sin)
    near(turned, expected)
    near(layers.turned(library, turned, cos, sin, inverse=True), wide, 0.02)


@pytest.mark.parametrize("d", [7, 301, 4096])
def test_losses_and_their_gradient(library, d):
    logits, labels, weights = normal(9, d) * 8, torch.arange(9) % d, torch.rand(9)
    labels[:3] = logits[:3].argmax(-1)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none") * weights
    losses, hits, gradient = layers.losses(library, logits, labels, weights, with_gradient=True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(hits, weights * (logits.argmax(-1) == labels))
    near(gradient, *torch.autograd.grad(expected.sum(), exact))
    assert layers.losses(library, logits, labels, weights, with_gradient=False)[2] is None


def test_the_first_of_equal_logits_is_the_prediction(library):
    logits, weights = torch.zeros(2, 40, dtype=BF16), torch.ones(2)
    logits[:, 5] = logits[:, 30] = 2.0
    assert layers.losses(library, logits, torch.tensor([5, 30]), weights, with_gradient=False)[1].tolist() == [1, 0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("column", [3, 38])
def test_a_logit_that_is_not_finite_makes_its_rows_loss_nan(library, poison, column):
    logits, weights = normal(2, 40), torch.ones(2)
    logits[0, column] = poison
    losses, _, gradient = layers.losses(library, logits, torch.tensor([1, 1]), weights, with_gradient=True)
    assert losses[0].isnan() and losses[1].isfinite()
    assert gradient[0].isnan().any() and gradient[1].isfinite().all()
