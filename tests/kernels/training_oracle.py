"""A reference for `grouped_lora` that computes one row at a time, with example adapters and comparisons."""

import math

import pytest
import torch

from loramill.kernels.batch import Batch, Slot
from loramill.kernels.training import Trainable

SLOTS = tuple(Slot(index, 0) for index in range(6))
ONE, TWO, THREE = SLOTS[:3]


def trainable(r, d_in, d_out, dtype=torch.float32, **rest):
    a = torch.randn(r, d_in, dtype=dtype, requires_grad=True)
    b = torch.randn(d_out, r, dtype=dtype, requires_grad=True)
    return Trainable(a, b, **{"scale": 2 / math.sqrt(r), **rest})


def mask(seed, p, rows, d_in):
    """The dropout mask that the docstring of `grouped_lora` specifies, applied to ones."""
    words = torch.empty(math.ceil(rows * d_in / 4), dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    steps = round(p * 2**16)
    kept = words.view(torch.int16)[: rows * d_in].view(rows, d_in) >= steps - 2**15
    return kept / (1 - torch.tensor(steps / 2**16, dtype=torch.float64))


def row_by_row(x, base, adapters, batch, bias=None):
    """The contract one row at a time, for autograd."""
    owner = {row: run.slot for run in batch.runs for row in range(batch.rows)[run.rows]}
    masks = {}
    for slot, adapter in adapters.items():
        own = [row for row in range(batch.rows) if owner.get(row) == slot]
        drawn = mask(adapter.seed, adapter.dropout, len(own), x.shape[1])
        masks |= dict(zip(own, drawn, strict=True))
    lines = []
    for row in range(batch.rows):
        line = base @ x[row] if bias is None else base @ x[row] + bias
        if row in masks:
            adapter = adapters[owner[row]]
            seen = x[row] * masks[row].to(x.dtype)
            line = line + adapter.scale * (adapter.b.to(x.dtype) @ (adapter.a.to(x.dtype) @ seen))
        lines.append(line)
    return torch.stack(lines)


def assert_near(got, expected, tolerance, what):
    """Within tolerance of the largest expected element; the message shows the worst elements."""
    assert got.shape == expected.shape, what
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).abs().nan_to_num(nan=math.inf)
    limit = tolerance * max(expected.abs().max().item(), 1e-3)
    if error.max() > limit:
        worst = error.flatten().topk(min(5, error.numel())).indices
        shown = [(i, got.flatten()[i].item(), expected.flatten()[i].item()) for i in worst.tolist()]
        pytest.fail(
            f"{what} {list(got.shape)}: off by {error.max():.3g}, limit {limit:.3g}; (at, got, expected): {shown}"
        )


def assert_same_bits(got, expected, what):
    assert torch.equal(got, expected), f"{what}: {(got != expected).sum()} of {got.numel()} elements differ"


def gradients(function, x, base, adapters, batch, dy, **rest):
    """y, and the gradients of x and of every adapter's a and b, as a dictionary."""
    wanted = {"x": x} | {f"{slot.index}.{n}": getattr(t, n) for slot, t in adapters.items() for n in "ab"}
    y = function(x, base, adapters, batch, **rest)
    found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def example(p=0.3):
    adapters = {ONE: trainable(3, 12, 10, dropout=p, seed=1), TWO: trainable(7, 12, 10, dropout=p, seed=2)}
    batch = Batch.of([(ONE, 4), (None, 1), (TWO, 6), (ONE, 2)])
    return torch.randn(13, 12, requires_grad=True), torch.randn(10, 12), adapters, batch
