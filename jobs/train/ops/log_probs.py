"""Log-probabilities of tokens one by one, for losses that are not a weighted sum of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from loramill.jobs.train.ops.loss import HEAD_ROWS


class _TokenLogProbs(torch.autograd.Function):
    """Keeps the logits, or what the head makes them from, and one number per token; torch would keep two more copies
    of the logits in float32."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [_of_rows(_logits(states[rows], head), labels[rows]) for rows in _slices(states, head)]
        log_probs, norms, correct = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(states, head, labels, norms)
        ctx.mark_non_differentiable(correct)
        return log_probs, correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        states, head, labels, norms = ctx.saved_tensors
        result = torch.empty_like(states)
        for rows in _slices(states, head):
            x = _logits(states[rows], head).sub_(norms[rows, None]).exp_().mul_(-gradient[rows, None])
            x.scatter_add_(1, labels[rows, None], gradient[rows, None])
            if head is None:
                result[rows] = x
            else:
                torch.mm(x.to(head.dtype), head, out=result[rows])
        return result, None, None


def token_log_probs(
    states: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log softmax(logits)[label] of each token in nats, and whether the label is the most likely token.

    The first has a gradient for `states`, but no second one.

    Args:
        states: the logits [S, vocabulary]; or what the head makes them from, [S, d].
        head: the head's frozen weights, [vocabulary, d], with which only `HEAD_ROWS` rows of logits exist at a time;
            None if `states` are logits.
        labels: int64 [S].

    Returns:
        float32 [S] and bool [S].
    """
    log_probs, correct = _TokenLogProbs.apply(states, head, labels)  # type: ignore[no-untyped-call]
    return log_probs, correct


def _slices(states: torch.Tensor, head: torch.Tensor | None) -> list[slice]:
    step = HEAD_ROWS if head is not None else max(1, len(states))
    return [slice(start, start + step) for start in range(0, len(states), step)]


def _logits(states: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
    """A float32 copy."""
    logits = states if head is None else F.linear(states, head)
    return logits.float() if logits.dtype != torch.float32 or head is not None else logits.clone()


def _of_rows(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels, the logarithms of the sums of exponentials, and whether the labels are best."""
    own = x.gather(1, labels[:, None])[:, 0]
    top = x.max(-1)
    norms = x.sub_(top.values[:, None]).exp_().sum(-1).log_().add_(top.values)
    return own - norms, norms, top.indices == labels
