"""Cross-entropy and accuracy of weighted tokens."""

from __future__ import annotations

from ctypes import CDLL
from typing import Any

import torch
from torch.nn import functional as F

from loramill.kernels.cpu.training_layers import losses as native_losses
from loramill.kernels.training import native_library

#: Rows whose logits `cross_entropy_of_head` computes at once: for 128,256 tokens and bfloat16, 0.13 GB and twice as
#: much in float32. Fewer would read the head's weights more often than the matrix units take to use them.
HEAD_ROWS = 512


class _CrossEntropy(torch.autograd.Function):
    """Computes the logits' gradient with the loss: one float32 copy of the logits, half of torch's time."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        library = native_library(logits.device, logits.dtype)
        if library is not None:
            return _native_cross_entropy(ctx, library, logits, labels, weights)
        x = logits.float() if logits.dtype != torch.float32 else logits.clone()
        loss, correct = _in_place(x, labels, weights, with_gradient=ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x.to(logits.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        whole = d_loss.device.type == "cpu" and d_loss.item() == 1  # on a GPU, reading it would wait
        return gradient if whole else gradient * d_loss, None, None


def _native_cross_entropy(
    ctx: Any, library: CDLL, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    wanted = ctx.needs_input_grad[0]
    losses, hits, gradient = native_losses(library, rows, labels, weights.contiguous(), with_gradient=wanted)
    if gradient is not None:
        ctx.save_for_backward(gradient)
    correct = hits.sum()
    ctx.mark_non_differentiable(correct)
    return losses.sum(), correct


class _CrossEntropyOfHead(torch.autograd.Function):
    """Computes the gradient of the hidden states with the loss, so that no logits remain."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            x = F.linear(hidden[rows], weight).float()
            sums += torch.stack(_in_place(x, labels[rows], weights[rows], with_gradient=wanted))
            if gradient is not None:
                torch.mm(x.to(weight.dtype), weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        loss, correct = (each.clone() for each in sums)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss, None, None, None


def _in_place(
    x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the weight of the right predictions of float32 logits x, which become their gradient."""
    top = x.max(-1)
    own = x.gather(1, labels[:, None])[:, 0]
    sums = x.sub_(top.values[:, None]).exp_().sum(-1)
    loss = ((sums.log() + top.values - own) * weights).sum()
    if with_gradient:
        x.mul_((weights / sums)[:, None])
        x.scatter_add_(1, labels[:, None], -weights[:, None])
    return loss, (top.indices == labels).float() @ weights


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


def cross_entropy_of_head(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_entropy` of the logits `hidden @ weight.T`, of which only `HEAD_ROWS` rows exist at a time.

    Args:
        hidden: [tokens, d].
        weight: the head's frozen weights, [vocabulary, d].
        labels, weights: as of `cross_entropy`.

    Returns:
        As `cross_entropy`; the loss has a gradient for `hidden`.
    """
    loss, correct = _CrossEntropyOfHead.apply(hidden, weight, labels, weights)  # type: ignore[no-untyped-call]
    return loss, correct
