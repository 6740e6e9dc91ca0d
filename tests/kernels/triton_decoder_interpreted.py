"""Norms, gates and rotation by the Triton kernels against plain torch; test_triton_decoder.py runs this interpreted.

float16 has the bits of plain torch, which rounds at the same places. bfloat16 does not here: the interpreter cuts its
bits off instead of rounding them.
"""

from functools import partial

import pytest
import torch

from loramill.errors import EngineFault
from loramill.kernels import KVSpan, Pages, torch_backend, triton
from loramill.kernels.backend import HeadNorms
from loramill.kernels.triton import StaticPages
from loramill_bench.kernels import cuda_decoder

from ..triton_interpreter import fast_interpreter, nan_in_fresh_memory  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

#: Relative to the largest element.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}
#: Larger than anything that is computed.
UNWRITTEN = 1024
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def part_of_wider(rows, columns, dtype):
    """Random rows that are part of wider ones, which are NaN elsewhere."""
    wide = torch.full((rows, columns + 9), torch.nan, dtype=dtype)
    wide[:, 5 : 5 + columns] = torch.randn(rows, columns).to(dtype)
    return wide[:, 5 : 5 + columns]


def near(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.numel():
        error = (got.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max()
        assert error <= TOLERANCE[got.dtype] * max(1.0, expected.abs().max().item()), error


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 1), (3, 37), (2, 576), (1, 4096)])
def test_norms(dtype, rows, width):
    x, residual = (part_of_wider(rows, width, dtype) for _ in "xr")
    weight, inner = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for offset in (0.0, 1.0):
        near(triton.rms_norm(x, weight, 1e-5, offset), torch_backend.rms_norm(x, weight, 1e-5, offset))
        for of_x in (None, inner):
            got, expected = residual.clone(), residual.clone()
            normed = triton.add_rms_norm(got, x, weight, 1e-5, offset, of_x)
            near(normed, torch_backend.add_rms_norm(expected, x, weight, 1e-5, offset, of_x))
            near(got, expected)


def test_a_norm_writes_nothing_but_its_rows():
    wide = torch.randn(3, 40)
    before = wide.clone()
    triton.add_rms_norm(wide[:, 3:20], torch.ones(3, 17), torch.ones(17), 1e-5)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 20:], before[:, 20:])


def test_norms_of_any_shape():
    heads, weight = part_of_wider(2, 5 * 16, torch.float32).view(2, 5, 16)[:, 1:4], torch.randn(16)
    for x in (heads, heads[:, 0], heads[1, 2], heads.transpose(0, 1)):
        near(triton.rms_norm(x, weight, 1e-6), torch_backend.rms_norm(x, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates(dtype, activation):
    for rows, width in ((0, 8), (1, 1), (3, 37), (1, 1500)):
        x = part_of_wider(rows, 2 * width, dtype)
        near(triton.gated_activation(x, activation), torch_backend.gated_activation(x, activation))
    gate = torch.tensor([-1e12, -200.0, -88.5, -20.0, -3.0, -1e-20, 0.0, 1.0, 20.0, 88.5, 200.0, 1e12])
    x = torch.cat((gate.clamp(-6e4, 6e4) if dtype == torch.float16 else gate, torch.linspace(-1, 1, 12)))[None]
    x = x.to(dtype)
    near(triton.gated_activation(x, activation), torch_backend.gated_activation(x, activation))


def test_nan_stays_in_its_row():
    clean, weight = torch.randn(4, 34).half(), torch.ones(17).half()
    broken = clean.clone()
    broken[2, 16] = torch.nan

    def results(x):
        half = x[:, :17]
        normed = triton.add_rms_norm(half.clone(), half, weight, 1e-5, 0.0, weight)
        return triton.rms_norm(half, weight, 1e-5), normed, triton.gated_activation(x)

    for good, bad in zip(results(clean), results(broken), strict=True):
        assert torch.equal(good[[0, 1, 3]], bad[[0, 1, 3]])
        assert bad[2, 16].isnan()


def rotated(ops, qkv, heads, kv_heads, head_dim, pages, angles, norms):
    qkv, kv = qkv.clone(), ops.new_kv(1, 6, pages.block_size, kv_heads, head_dim, qkv.dtype)[0]
    kv.keys.fill_(UNWRITTEN)
    kv.values.fill_(UNWRITTEN)
    ops.rope_write(qkv, heads, angles.cos(), angles.sin(), kv, pages, norms)
    return qkv[:, : heads * head_dim], kv.keys, kv.values


#: Query heads, KV heads, head_dim: several programs per row, one head more than a tile, halves of 31, 40 and 128.
HEADS = [(9, 3, 64), (5, 1, 16), (2, 2, 80), (1, 1, 62), (3, 1, 256)]


@DTYPES
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0], ids=["no norms", "norms", "offset norms"])
def test_rotation_and_paging(dtype, shape, offset):
    heads, kv_heads, head_dim = shape
    pages = Pages.of([KVSpan(0, 1, [5]), KVSpan(14, 3, [2, 1]), KVSpan(20, 1, [3, 0])], 16)
    angles = torch.rand(5, head_dim // 2) * 7
    q_norm, k_norm = torch.randn(2, head_dim).to(dtype)
    norms = None if offset is None else HeadNorms(q_norm, k_norm, 1e-6, offset)
    qkv = part_of_wider(5, (heads + 2 * kv_heads) * head_dim, dtype)
    got, expected = (
        rotated(ops, qkv, heads, kv_heads, head_dim, pages, angles, norms) for ops in (triton, torch_backend)
    )
    for mine, theirs in zip(got, expected, strict=True):
        near(mine, theirs)
        # Nothing else was written, and values are copied.
        assert torch.equal(mine == UNWRITTEN, theirs == UNWRITTEN)
    assert torch.equal(got[2], expected[2])


def test_float16_has_the_bits_of_plain_torch():
    x, residual, weight = torch.randn(3, 96).half(), torch.randn(3, 96).half(), torch.randn(96).half()
    pages, angles = Pages.of([KVSpan(3, 3, [1])], 16), torch.rand(3, 8)
    results = []
    for ops in (triton, torch_backend):
        own = residual.clone()
        normed = ops.add_rms_norm(own, x, weight, 1e-5, 0.0, weight)
        norms = HeadNorms(weight[:16], weight[16:32], 1e-6)
        results.append((own, normed, ops.gated_activation(x), *rotated(ops, x, 2, 2, 16, pages, angles, norms)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_unused_rows_of_a_graph_write_to_the_scratch_block():
    static = StaticPages(rows=4, blocks=4, block_size=16, scratch=5, device=torch.device("cpu"))
    static.refresh(Pages.of([KVSpan(17, 1, [2, 3])], 16))
    qkv, angles = torch.randn(4, 4 * 16), torch.zeros(4, 8)
    _, keys, values = rotated(triton, qkv, 2, 1, 16, static.pages, angles, None)
    for part in (keys, values):
        assert {tuple(at) for at in (part != UNWRITTEN).nonzero()[:, :2].tolist()} == {(3, 1), (5, 0)}


def test_no_rows():
    qkv = torch.randn(0, 4 * 16)
    q, keys, _ = rotated(triton, qkv, 2, 1, 16, Pages.of([], 16), torch.zeros(0, 8), None)
    assert q.shape == (0, 32)
    assert (keys == UNWRITTEN).all()


def test_tensors_that_a_kernel_would_misread_are_refused():
    x, weight = torch.randn(4, 32), torch.randn(32)
    kv, pages = triton.new_kv(1, 1, 16, 1, 32, torch.float32)[0], Pages.of([KVSpan(0, 4, [0])], 16)
    qkv, angles = torch.randn(4, 3 * 32), torch.ones(4, 16)
    for call in (
        lambda: triton.rms_norm(x, weight[:16], 1e-5),
        lambda: triton.rms_norm(x, weight.bfloat16(), 1e-5),
        lambda: triton.add_rms_norm(x.T, torch.randn(32, 4), torch.ones(4), 1e-5),
        lambda: triton.add_rms_norm(x[:3], x, weight, 1e-5),
        lambda: triton.add_rms_norm(x, x, weight, 1e-5, 0.0, weight[:8]),
        lambda: triton.gated_activation(x.T),
        lambda: triton.rope_write(qkv, 2, angles, angles, kv, pages),
        lambda: triton.rope_write(qkv.half(), 1, angles, angles, kv, pages),
        lambda: triton.rope_write(qkv, 1, angles[:, :8], angles, kv, pages),
        lambda: triton.rope_write(qkv, 1, angles, torch.ones(4, 32)[:, ::2], kv, pages),
    ):
        with pytest.raises(EngineFault, match=r"must be|don't fit|residual"):
            call()


def test_the_bench_checks_run_on_a_cpu_and_detect_an_error(monkeypatch):
    monkeypatch.setattr(cuda_decoder, "WIDTHS", (100,))
    monkeypatch.setattr(cuda_decoder, "HEADS", ((5, 1, 62),))
    monkeypatch.setattr(cuda_decoder, "GATES", (100,))
    checks = list(cuda_decoder.check("cpu", dtypes=[torch.float32]))
    assert len(checks) == 8
    assert all(check.passed for check in checks), checks

    def shifted(error, got, expected):
        return error(got, [part + part.abs().max() for part in expected])

    monkeypatch.setattr(cuda_decoder, "_error", partial(shifted, cuda_decoder._error))
    assert not next(cuda_decoder.check("cpu", dtypes=[torch.float32])).passed
