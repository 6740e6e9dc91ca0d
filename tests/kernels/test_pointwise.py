"""Norms, SwiGLU, rotation and the writing of pages, on every backend, against float64."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.kernels import KVSpan, Pages
from loramill.kernels.backend import HeadNorms

from .conftest import BACKENDS, open_backend
from .oracle import TOLERANCE, assert_near

# Widths around the lanes of a register, and those of some models.
WIDTHS = [1, 2, 15, 16, 17, 31, 33, 64, 100, 576, 1536]
# Heads, KV heads, head_dim, block_size.
SHAPES = [(9, 3, 64, 16), (4, 4, 32, 32), (5, 1, 48, 16), (2, 2, 80, 48), (3, 1, 96, 16), (2, 1, 128, 32)]
SHAPES += [(2, 1, 256, 16), (3, 1, 34, 16), (1, 1, 62, 16)]


def near(got, expected, dtype):
    """Fails, with the worst elements, unless `got` is `expected` (float64) up to the dtype's rounding."""
    assert got.dtype == dtype
    assert_near(got, expected, TOLERANCE[dtype])


def rows_of_wider(rows, columns, dtype):
    """Random rows that are part of wider ones."""
    return torch.randn(rows, columns + 9).to(dtype)[:, 5 : 5 + columns]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(ops, dtype, width):
    for rows in (0, 1, 2, 33):
        x, weight = rows_of_wider(rows, width, dtype) * 3, torch.randn(width).to(dtype)
        before = x.clone()
        got = ops.rms_norm(x, weight, 1e-5)
        near(got, F.rms_norm(x.double(), (width,), weight.double(), 1e-5), dtype)
        assert torch.equal(x, before)


def test_rms_norm_of_heads_and_of_any_shape(ops, dtype):
    weight = torch.randn(48).to(dtype)
    heads = rows_of_wider(7, 5 * 48, dtype).view(7, 5, 48)[:, 1:4]
    for x in (heads, heads[:, 0], heads[2, 1], heads.transpose(0, 1), heads[:, None].expand(7, 2, 3, 48)):
        near(ops.rms_norm(x, weight, 1e-6), F.rms_norm(x.double(), (48,), weight.double(), 1e-6), dtype)


def test_eps_keeps_small_rows_small(ops):
    x = torch.tensor([[1e-4] * 20, [0.0] * 20])
    got = ops.rms_norm(x, torch.ones(20), 1e-2)
    near(got, F.rms_norm(x.double(), (20,), None, 1e-2), torch.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(ops, dtype, width):
    residual, x = rows_of_wider(13, width, dtype), torch.randn(13, width + 4).to(dtype)[:, :width]
    weight, added = torch.randn(width).to(dtype), (residual.double() + x.double()).to(dtype)
    got = ops.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(residual, added)
    near(got, F.rms_norm(added.double(), (width,), weight.double(), 1e-5), dtype)


def test_the_offset_of_a_norm_is_added_to_its_weight(ops, dtype):
    x, weight = rows_of_wider(5, 100, dtype), torch.randn(100).to(dtype)
    near(ops.rms_norm(x, weight, 1e-5, 1.0), F.rms_norm(x.double(), (100,), 1 + weight.double(), 1e-5), dtype)
    # In float32: 1.003 would be 1 in bfloat16, and every third result another.
    small = torch.full((100,), 0.003).to(dtype)
    got = ops.rms_norm(x.bfloat16(), small.bfloat16(), 1e-5, 1.0)
    exact = F.rms_norm(x.bfloat16().double(), (100,), 1 + small.bfloat16().double(), 1e-5)
    assert (got == exact.bfloat16()).float().mean() > 0.97


@pytest.mark.parametrize(("offset", "has_inner"), [(0.0, True), (1.0, False), (1.0, True)])
def test_add_rms_norm_of_an_inner_norm_and_with_an_offset(ops, dtype, offset, has_inner):
    residual, x = rows_of_wider(7, 100, dtype), rows_of_wider(7, 100, dtype)
    weight, inner = torch.randn(100).to(dtype), torch.randn(100).to(dtype) if has_inner else None
    before, own = residual.clone(), x.clone()
    added = x if inner is None else ops.rms_norm(x, inner, 1e-5, offset)
    got = ops.add_rms_norm(residual, x, weight, 1e-5, offset, inner)
    assert torch.equal(residual, (before.double() + added.double()).to(dtype))
    near(got, F.rms_norm(residual.double(), (100,), weight.double() + offset, 1e-5), dtype)
    assert torch.equal(x, own)


def test_add_rms_norm_writes_nothing_but_its_rows(ops, dtype):
    wide = torch.randn(4, 40).to(dtype)
    before = wide.clone()
    ops.add_rms_norm(wide[:, 3:20], torch.ones(4, 17, dtype=dtype), torch.ones(17, dtype=dtype), 1e-5)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 20:], before[:, 20:])


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_times_up(ops, dtype, width):
    for rows in (0, 1, 2, 33):
        x = rows_of_wider(rows, 2 * width, dtype)
        gate, up = x.double().chunk(2, dim=-1)
        got = ops.gated_activation(x * 1)
        near(got, F.silu(gate) * up, dtype)
        assert torch.equal(ops.gated_activation(x), got)


@pytest.mark.parametrize(
    ("activation", "function"), [("silu", F.silu), ("gelu_tanh", partial(F.gelu, approximate="tanh"))]
)
def test_gates_of_any_size(ops, dtype, activation, function):
    gate = torch.tensor(
        [-1e12, -200.0, -88.5, -87.0, -20.0, -3.0, -1e-20, 0.0, 1e-20, 1.0, 20.0, 87.0, 88.5, 200.0, 1e12]
    )
    up = torch.linspace(-2, 2, len(gate)) + 0.01
    x = torch.cat((gate, up))[None].to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    near(ops.gated_activation(x, activation), function(gate) * up, dtype)


@pytest.mark.parametrize("width", [17, 576])
def test_nan_stays_in_its_row(ops, dtype, width):
    weight = torch.ones(width, dtype=dtype)
    clean = torch.randn(5, 2 * width).to(dtype)
    broken = clean.clone()
    broken[2, width - 1] = torch.nan
    keep = [0, 1, 3, 4]

    def operations(x):
        half = x[:, :width]
        norm, silu = ops.rms_norm(half, weight, 1e-5), ops.gated_activation(x)
        return norm, ops.add_rms_norm(half.clone(), half, weight, 1e-5), silu

    for good, bad in zip(operations(clean), operations(broken), strict=True):
        assert torch.equal(good[keep], bad[keep])
        assert bad[2, width - 1].isnan()
    assert all(norm[2].isnan().all() for norm in operations(broken)[:2])


def positions_of(kv):
    """Keys and values [blocks, block_size, kv_heads, head_dim], out of any backend's layout."""
    if kv.keys.dim() == 4:
        return kv.keys, kv.values
    keys = kv.keys.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).unflatten(2, (kv.kv_heads, kv.head_dim))
    values = kv.values.permute(0, 2, 4, 1, 3).flatten(1, 2)[..., : kv.head_dim]
    return keys, values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_write(ops, dtype, shape):
    heads, kv_heads, head_dim, block_size = shape
    layers = ops.new_kv(3, 12, block_size, kv_heads, head_dim, dtype)
    for kv in layers:
        kv.keys.fill_(7)
        kv.values.fill_(7)
    # Ends within a block, and begins within one.
    spans = [
        KVSpan(0, 1, [5]),
        KVSpan(block_size - 2, 5, [9, 2]),
        KVSpan(2 * block_size, 1, [1, 0, 11]),
        KVSpan(3, 20, [7, 4, 3]),
    ]
    pages = Pages.of(spans, block_size)
    qkv = rows_of_wider(27, (heads + 2 * kv_heads) * head_dim, dtype)
    q, k, v = qkv.reshape(27, -1, head_dim).double().split([heads, kv_heads, kv_heads], 1)
    angles = torch.rand(27, head_dim // 2) * 7
    turn = torch.polar(torch.ones(()).double(), angles.double())[:, None]

    def rotated(x):
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    ops.rope_write(qkv, heads, angles.cos(), angles.sin(), layers[1], pages)
    near(qkv.reshape(27, -1, head_dim)[:, :heads], rotated(q), dtype)
    keys, values = positions_of(layers[1])
    at = torch.from_numpy(pages.slots).long()
    near(keys.flatten(0, 1)[at], rotated(k), dtype)
    assert torch.equal(values.flatten(0, 1)[at].double(), v)
    # Nothing else was written.
    for part in (keys, values):
        others = part.flatten(0, 1).index_fill(0, at, 7)
        assert (others == 7).all()
    assert all((part == 7).all() for layer in (layers[0], layers[2]) for part in (layer.keys, layer.values))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_heads_are_normalized_before_they_are_rotated(ops, dtype, shape, offset):
    heads, kv_heads, head_dim, block_size = shape
    pages, angles = Pages.of([KVSpan(block_size - 3, 5, [2, 0])], block_size), torch.rand(5, head_dim // 2) * 7
    norms = HeadNorms(torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype), 1e-6, offset)
    qkv = rows_of_wider(5, (heads + 2 * kv_heads) * head_dim, dtype)
    before = qkv.clone()
    split = before.view(5, -1, head_dim)
    for part, weight in ((split[:, :heads], norms.q), (split[:, heads : heads + kv_heads], norms.k)):
        part.copy_(F.rms_norm(part.double(), (head_dim,), weight.double() + offset, 1e-6))
    fused, alone = ops.new_kv(2, 3, block_size, kv_heads, head_dim, dtype)
    ops.rope_write(qkv, heads, angles.cos(), angles.sin(), fused, pages, norms)
    ops.rope_write(before, heads, angles.cos(), angles.sin(), alone, pages)
    at, columns = torch.from_numpy(pages.slots).long(), heads * head_dim
    near(qkv[:, :columns], before[:, :columns].double(), dtype)
    (keys, values), (expected_keys, expected_values) = positions_of(fused), positions_of(alone)
    near(keys.flatten(0, 1)[at], expected_keys.flatten(0, 1)[at].double(), dtype)
    assert torch.equal(values.flatten(0, 1)[at], expected_values.flatten(0, 1)[at])


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32),
)
def test_any_rows(name, rows, width, dtype, size, seed):
    ops, generator = open_backend(name), torch.Generator().manual_seed(seed)
    x, weight = ((torch.randn(n, generator=generator) * size).to(dtype) for n in ((rows, 2 * width), (width,)))
    half, residual = x[:, width:], x[:, :width].clone()
    normed = F.rms_norm(half.double(), (width,), weight.double(), 1e-5)
    near(ops.rms_norm(half, weight, 1e-5) / size, normed / size, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    near(ops.gated_activation(x) / size**2, F.silu(gate) * up / size**2, dtype)
    added = (residual.double() + half.double()).to(dtype)
    got = ops.add_rms_norm(residual, half, weight, 1e-5)
    assert torch.equal(residual, added)
    near(got / size, F.rms_norm(added.double(), (width,), weight.double(), 1e-5) / size, dtype)


def test_tensors_that_a_kernel_would_misread_are_refused(native):
    x, weight = torch.randn(4, 32), torch.randn(32)
    for call in (
        lambda: native.rms_norm(x.T, torch.ones(4), 1e-5),
        lambda: native.rms_norm(x, weight[:16], 1e-5),
        lambda: native.rms_norm(x, weight.bfloat16(), 1e-5),
        lambda: native.rms_norm(x, torch.randn(64)[::2], 1e-5),
        lambda: native.add_rms_norm(x.bfloat16(), x, weight, 1e-5),
        lambda: native.add_rms_norm(x[:3], x, weight, 1e-5),
        lambda: native.gated_activation(x.T),
    ):
        with pytest.raises(EngineFault, match="don't match"):
            call()


def test_angles_or_heads_that_do_not_fit_are_refused(native):
    pages = Pages.of([KVSpan(0, 2, [0])], 16)
    kv = native.new_kv(1, 1, 16, 1, 32, torch.float32)[0]
    good, qkv = torch.ones(2, 16), torch.randn(2, 3 * 32)
    for angles, rows, heads in (
        (good[:, :8], qkv, 1), (good.double(), qkv, 1), (torch.ones(2, 32)[:, ::2], qkv, 1), (good, qkv, 2),
        (good, qkv.bfloat16(), 1), (good, torch.randn(96, 2).T, 1),
    ):  # fmt: skip
        with pytest.raises(EngineFault, match="don't match"):
            native.rope_write(rows, heads, angles, angles, kv, pages)
    for rows, heads in ((qkv, 4), (qkv.bfloat16(), 1), (torch.randn(96, 2).T, 1)):
        with pytest.raises(EngineFault, match="don't match"):
            native.attention(rows, heads, kv, pages, 1.0)


def test_heavy_rows_are_summed_in_float32(ops):
    """A sum of squares in bfloat16 would stop growing."""
    x = torch.full((2, 4096), 1.0 + random.random()).bfloat16()
    near(ops.rms_norm(x, torch.ones(4096).bfloat16(), 0.0), torch.ones(2, 4096).double(), torch.bfloat16)
