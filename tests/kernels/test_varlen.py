"""Attention without a mask: the CPU reference against a mask, the arguments of the GPU operators, prefills in one call.

`loramill-bench kernels --device cuda` runs the operators on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from loramill.kernels import KVSpan, LayerKV, Pages
from loramill.kernels.attention import paged, varlen
from loramill.kernels.attention.varlen import VarlenBatch

from .oracle import TOLERANCE, assert_near
from .test_attention import World

CPU = torch.device("cpu")
#: Rows and keys of sequences: without and with a prefix, as short and as long as possible.
SEQUENCES = ((5, 5), (1, 1), (3, 17), (1, 30), (12, 13))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masked(q, k, v, causal, window, scale):
    """One sequence in float64 by torch's attention with a mask."""
    rows, keys = len(q), len(k)
    mask = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        mask = mask.tril(keys - rows)
    if window is not None:
        mask = mask.triu(keys - rows - window + 1)
    q, k, v = (part.double().transpose(0, 1)[None] for part in (q, k, v))
    done = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return done[0].transpose(0, 1)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 4), (True, 100), (False, None)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_the_reference_and_its_gradients_equal_attention_with_a_mask(heads, kv_heads, causal, window):
    rows, keys = zip(*SEQUENCES, strict=True)
    q, k, v = (
        drawn(sum(rows), heads, 16),
        drawn(sum(keys), kv_heads, 16, seed=1),
        drawn(sum(keys), kv_heads, 16, seed=2),
    )
    batch = VarlenBatch.of(rows, keys, CPU)
    out, logsumexp = varlen.forward(q, k, v, batch, scale=0.3, causal=causal, window=window)
    exact = [part.double().requires_grad_(True) for part in (q, k, v)]
    parts = zip(exact[0].split(rows), exact[1].split(keys), exact[2].split(keys), strict=True)
    expected = torch.cat([masked(*part, causal, window, 0.3) for part in parts])
    assert_near(out, expected, 3e-6)
    d_out = drawn(*out.shape, seed=3)
    got = varlen.backward(d_out, q, k, v, out, logsumexp, batch, scale=0.3, causal=causal, window=window)
    for own, other in zip(got, torch.autograd.grad(expected, exact, d_out.double()), strict=True):
        assert_near(own, other, 3e-6)


class Recorder:
    """Stands in for an operator, and keeps what it is given."""

    def __init__(self, result):
        self.result = result

    def __call__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        return self.result


def on_meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_inputs():
    starts = torch.empty(2, 4, dtype=torch.int32, device="meta")
    return on_meta(9, 8, 64), on_meta(40, 2, 64), on_meta(40, 2, 64), VarlenBatch(*starts, 5, 30)


@pytest.mark.parametrize(
    ("options", "causal", "left", "right"),
    [({}, True, None, 0), ({"window": 7}, True, 6, 0), ({"causal": False}, False, None, None)],
)
def test_the_operators_are_given_boundaries_and_window(monkeypatch, options, causal, left, right):
    q, k, v, batch = meta_inputs()
    forward = Recorder((q, "sums", "random", "unused", "mask"))
    backward = Recorder(("dq", "dk", "dv"))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    assert varlen.forward(q, k, v, batch, scale=0.25, **options) == (q, "sums")
    given = {"scale": 0.25, "window_size_left": left, "window_size_right": right}
    boundaries = (batch.row_starts, batch.key_starts, 5, 30)
    assert forward.kwargs == backward_kwargs(varlen.backward, q, k, v, batch, backward, options) == given
    assert all(own is other for own, other in zip(forward.args[:3], (q, k, v), strict=True))
    assert all(own is other for own, other in zip(forward.args[3:5], boundaries[:2], strict=True))
    assert forward.args[5:] == (5, 30, 0.0, causal, False)
    assert backward.args[:2] == ("d_out", q) and backward.args[4:6] == ("out", "sums")
    assert backward.args[8:12] == (5, 30, 0.0, causal)
    assert all(own is other for own, other in zip(backward.args[6:8], boundaries[:2], strict=True))


def backward_kwargs(call, q, k, v, batch, recorder, options):
    assert call("d_out", q, k, v, "out", "sums", batch, scale=0.25, **options) == ("dq", "dk", "dv")
    return recorder.kwargs


@pytest.mark.parametrize("window", [None, 7])
def test_the_operators_accept_these_arguments(window):
    q, k, v, batch = meta_inputs()
    out, sums = varlen.forward(q, k, v, batch, scale=0.25, window=window)
    assert (out.shape, out.dtype, sums.shape, sums.dtype) == (q.shape, q.dtype, (8, 9), torch.float32)
    gradients = varlen.backward(out, q, k, v, out, sums, batch, scale=0.25, window=window)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


def test_only_the_backward_operator_runs_with_deterministic_algorithms(monkeypatch):
    q, k, v, batch = meta_inputs()
    recorder = Recorder(("dq", "dk", "dv"))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", recorder)
    for deterministic in (False, True):
        varlen.backward(q, q, k, v, q, q, batch, scale=1.0, deterministic=deterministic)
        assert recorder.deterministic is deterministic
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        varlen.backward(q, q, k, v, q, q, batch, scale=1.0, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_only_rows_that_are_not_read_by_16_bytes_are_copied():
    wide = drawn(6, 7 * 32).bfloat16()
    whole = wide.view(6, 7, 32)
    assert varlen._aligned(whole) is whole
    assert varlen._aligned(whole[2:, 1:4]).data_ptr() == whole[2:, 1:4].data_ptr()
    for odd in (wide[:, 3:99].unflatten(1, (3, 32)), drawn(6, 67).bfloat16()[:, :64].unflatten(1, (2, 32))):
        copied = varlen._aligned(odd)
        assert copied.data_ptr() % 16 == 0 and copied.is_contiguous() and torch.equal(copied, odd)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "forward", "backward"),
    [
        (torch.bfloat16, 128, True, True),
        (torch.float16, 256, True, True),
        (torch.bfloat16, 224, True, False),
        (torch.bfloat16, 264, False, False),
        (torch.bfloat16, 68, False, False),
        (torch.float32, 128, False, False),
    ],
)
def test_what_the_kernels_support(dtype, head_dim, forward, backward):
    assert varlen.is_supported(dtype, head_dim) is forward
    assert varlen.is_supported(dtype, head_dim, backward=True) is backward


def prefill(world, sequences, counts, window):
    """Runs the prefills of a step in one call; returns the result and the expected one, decodes left out."""
    q, qkv, pages = world.extend(sequences, counts)
    out = torch.full((len(qkv), world.heads * world.head_dim), -1.0, dtype=world.dtype)
    paged.attend_prefills_together(qkv, out, world.heads, world.kv[1], pages, world.scale, window)
    several = torch.tensor(counts).repeat_interleave(torch.tensor(counts)) > 1
    assert (out[~several] == -1).all(), "a decode's row was written"
    parts = zip(q.split(counts, dim=1), sequences, strict=True)
    expected = torch.cat([world.attend(part, sequence, window) for part, sequence in parts])
    return out[several], expected[several]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 2, 32, 16), (4, 4, 48, 32), (5, 1, 34, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 17, 64, 500])
def test_prefills_over_any_prefixes_in_one_call(shape, window, dtype):
    world = World("torch", dtype, *shape, seed=1)
    sequences = [world.sequence() for _ in range(5)]
    for counts in ([40, 1, 70, 16, 2], [3, 1, 1, 33, 90], [1, 1, 5, 1, 1], [2, 9, 20, 1, 1]):
        assert_near(*prefill(world, sequences, counts, window), TOLERANCE[dtype])


@pytest.mark.parametrize(("limit", "launches"), [(256 << 20, 1), (2 * 2 * 32 * 4 * 60, 3), (2 * 2 * 32 * 4, 5)])
def test_prefills_copy_a_limited_number_of_keys_at_once(monkeypatch, limit, launches):
    monkeypatch.setattr(paged, "GATHERED", limit)
    calls, forward = [], varlen.forward
    monkeypatch.setattr(varlen, "forward", lambda *args, **options: calls.append(args) or forward(*args, **options))
    world = World("torch", torch.float32, seed=1)
    sequences, counts = [world.sequence() for _ in range(6)], [40, 2, 1, 70, 16, 33]
    assert_near(*prefill(world, sequences, counts, None), TOLERANCE[torch.float32])
    assert len(calls) == launches
    assert sum(len(args[1]) for args in calls) == sum(counts) - 1


def test_prefills_next_to_one_another_are_neither_copied_nor_indexed():
    pages = Pages.of([KVSpan(3, 1, [0]), KVSpan(0, 3, [4]), KVSpan(14, 4, [1, 2]), KVSpan(0, 1, [3])], 16)
    (together,) = paged._prefills_together(pages, None, 1000, CPU)
    assert together.rows == slice(1, 8)
    assert together.batch.row_starts.tolist() == [0, 3, 7] and together.batch.key_starts.tolist() == [0, 3, 21]
    assert (together.batch.longest_rows, together.batch.longest_keys) == (4, 18)
    assert together.slots.tolist() == [64, 65, 66, *range(16, 34)]
    assert all(each.dtype == torch.int32 for each in (together.slots, together.batch.row_starts))
    assert paged._prefills_together(pages, None, 1000, CPU)[0] is together
    assert paged._prefills_together(Pages.of([KVSpan(3, 1, [0])], 16), None, 1000, CPU) == []


def test_a_gpu_gets_prefills_in_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(paged, "attend_prefills_together", lambda *args: calls.append(args))
    kv = LayerKV(on_meta(4, 16, 2, 64), on_meta(4, 16, 2, 64), 16, 2, 64)
    pages = Pages.of([KVSpan(0, 3, [1])], 16)

    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    paged.attend_prefills(OnGpu(), None, 8, kv, pages, 1.0, None)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (False, None)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (3, 1, 256)])
def test_the_operators_on_this_gpu_equal_the_reference(heads, kv_heads, head_dim, causal, window):
    sequences = (*SEQUENCES, (200, 700), (300, 300))
    rows, keys = zip(*sequences, strict=True)
    shapes = (sum(rows), heads, head_dim), (sum(keys), kv_heads, head_dim), (sum(keys), kv_heads, head_dim)
    inputs = [drawn(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes)]
    d_out = drawn(*shapes[0], seed=3).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        q, k, v = (part.to(device) for part in inputs)
        batch = VarlenBatch.of(rows, keys, q.device)
        options = {"scale": head_dim**-0.5, "causal": causal, "window": window}
        out, sums = varlen.forward(q, k, v, batch, **options)
        gradients = varlen.backward(d_out.to(device), q, k, v, out, sums, batch, **options, deterministic=True)
        results.append([part.cpu().float() for part in (out, sums, *gradients)])
    for got, expected in zip(*reversed(results), strict=True):
        assert_near(got, expected, 2e-2)
