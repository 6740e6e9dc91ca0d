"""Cross-entropy and accuracy of weighted tokens."""

from __future__ import annotations

from typing import Any

import torch


class _CrossEntropy(torch.autograd.Function):
    """Computes the logits' gradient with the loss: one float32 copy of the logits, half of torch's time."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits.float() if logits.dtype != torch.float32 else logits.clone()
        top = x.max(-1)
        own = x.gather(1, labels[:, None])[:, 0]
        sums = x.sub_(top.values[:, None]).exp_().sum(-1)
        loss = ((sums.log() + top.values - own) * weights).sum()
        if ctx.needs_input_grad[0]:
            x.mul_((weights / sums)[:, None])
            x.scatter_add_(1, labels[:, None], -weights[:, None])
            ctx.save_for_backward(x.to(logits.dtype))
        correct = (top.indices == labels).float() @ weights
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss, None, None


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sum over the tokens of weight * -log softmax(logits)[label], with a gradient (no second one), and the
    sum of the weights of the tokens whose most likely prediction is the label.

    Args:
        logits: [tokens, vocabulary].
        labels: int64 [tokens].
        weights: float32 [tokens].

    Returns:
        Two float32 scalars.
    """
    loss, correct = _CrossEntropy.apply(logits, labels, weights)  # type: ignore[no-untyped-call]
    return loss, correct
