"""Log-probabilities of tokens against torch's own, whole and behind a head in slices."""

from __future__ import annotations

import pytest
import torch

from loramill.jobs.train.ops import log_probs
from loramill.jobs.train.ops.log_probs import token_log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_head", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(monkeypatch, dtype, with_head):
    monkeypatch.setattr(log_probs, "HEAD_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 8 if with_head else 11, generator=generator).mul(3).to(dtype).requires_grad_()
    head = torch.randn(11, 8, generator=generator).to(dtype) if with_head else None
    labels, weights = torch.tensor([0, 3, 10, 5, 5, 1, 2]), torch.randn(7, generator=generator)

    found, correct = token_log_probs(states, head, labels)
    (found * weights).sum().backward()
    got, states.grad = states.grad, None
    logits = states if head is None else states @ head.T
    expected = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (expected * weights).sum().backward()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert correct.tolist() == (logits.argmax(-1) == labels).tolist()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
    torch.testing.assert_close(got, states.grad, **tolerance)


def test_no_logits_are_changed():
    logits = torch.randn(4, 5)
    before = logits.clone()
    token_log_probs(logits, None, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(logits, before)


def test_no_gradient_is_computed_without_one():
    with torch.no_grad():
        found, _ = token_log_probs(torch.randn(4, 5), None, torch.tensor([0, 1, 2, 3]))
    assert not found.requires_grad
