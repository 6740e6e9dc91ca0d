"""Mixtures of experts on every backend, against float64 expert by expert."""

import pytest
import torch
import torch.nn.functional as F

from loramill.kernels import torch_backend
from loramill.kernels.experts import Experts, run_experts

from .oracle import TOLERANCE, assert_near

ROWS, HIDDEN, INNER, COUNT = 37, 48, 24, 6


def drawn(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def matrices(*shape):
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype)

    weights = matrices(COUNT, HIDDEN) * 4, matrices(COUNT, 2 * INNER, HIDDEN), matrices(COUNT, HIDDEN, INNER)
    return torch.randn(ROWS, HIDDEN, generator=draw).to(dtype), weights


def packed(ops, weights, top_k, normalized=True):
    router, gate_up, down = weights
    return Experts(ops.pack(router), ops.pack_experts(gate_up), ops.pack_experts(down), top_k, normalized)


def expected(x, weights, top_k, normalized):
    router, gate_up, down = (weight.double() for weight in weights)
    x = x.double()
    shares, chosen = (x @ router.T).softmax(-1).topk(top_k)
    if normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for share, expert in zip(shares[row], chosen[row], strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            out[row] += share * (down[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, COUNT])
def test_each_row_goes_through_its_experts(ops, top_k, normalized):
    x, weights = drawn(torch.float32)
    for rows in (x, x[:1], x[:0]):
        got = run_experts(ops, packed(ops, weights, top_k, normalized), rows, "silu")
        assert_near(got, expected(rows, weights, top_k, normalized), 4 * TOLERANCE[torch.float32])


def test_in_bfloat16_the_router_is_exact_enough(ops):
    x, weights = drawn(torch.bfloat16)
    got = run_experts(ops, packed(ops, weights, COUNT), x, "silu")
    assert got.dtype == torch.bfloat16
    assert_near(got, expected(x, weights, COUNT, True), 2 * TOLERANCE[torch.bfloat16])


def test_rows_depend_on_no_other_rows(native, dtype):
    x, weights = drawn(dtype)
    experts = packed(native, weights, 2)
    together = run_experts(native, experts, x, "silu")
    assert torch.equal(run_experts(native, experts, x[5:9], "silu"), together[5:9])
    x[7] = torch.nan
    broken = run_experts(native, experts, x, "silu")
    assert broken[7].isnan().all()
    assert torch.equal(broken[:7], together[:7])
    assert torch.equal(broken[8:], together[8:])


def test_with_one_kernel_for_all_experts_the_host_reads_nothing(monkeypatch):
    """Nothing can be read back from a meta tensor: it has no values."""
    x, weights = drawn(torch.bfloat16)
    experts = packed(torch_backend, weights, 2)
    plain = run_experts(torch_backend, experts, x, "silu")
    x, *on_meta = (tensor.to("meta") for tensor in (x, *weights))
    with pytest.raises(RuntimeError, match="meta"):
        run_experts(torch_backend, packed(torch_backend, on_meta, 2), x, "silu")
    monkeypatch.setattr(torch_backend, "has_grouped_kernel", lambda *_: True)
    assert run_experts(torch_backend, packed(torch_backend, on_meta, 2), x, "silu").shape == (ROWS, HIDDEN)
    x, weights = drawn(torch.bfloat16)
    assert_near(run_experts(torch_backend, experts, x, "silu"), plain.double(), 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "has"),
    [
        ((9, 0), torch.bfloat16, 24, True),
        ((10, 0), torch.bfloat16, 24, True),
        ((8, 9), torch.bfloat16, 24, False),
        ((12, 0), torch.bfloat16, 24, False),
        ((9, 0), torch.float32, 24, False),
        ((9, 0), torch.bfloat16, 20, False),
    ],
)
def test_only_hopper_and_blackwell_have_the_kernel(monkeypatch, capability, dtype, width, has):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    weights = torch_backend.pack_experts(torch.zeros(2, width, 16, dtype=dtype))
    assert torch_backend.has_grouped_kernel(torch.device("cuda"), dtype, weights) is has
    assert not torch_backend.has_grouped_kernel(torch.device("cpu"), dtype, weights)


@pytest.mark.gpu
def test_the_kernel_on_this_gpu_is_right_in_a_graph():
    x, weights = (drawn(torch.bfloat16)[0].cuda(), [weight.cuda() for weight in drawn(torch.bfloat16)[1]])
    experts = packed(torch_backend, weights, 2)
    run_experts(torch_backend, experts, x, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_experts(torch_backend, experts, x, "silu")
    x.copy_(x.flip(0))
    graph.replay()
    cpu = [weight.cpu() for weight in weights]
    assert_near(got.cpu(), expected(x.cpu(), cpu, 2, True), 2 * TOLERANCE[torch.bfloat16])
