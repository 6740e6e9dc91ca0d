"""Attention for training: over short rows on a CPU, and over packed rows without a mask on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from loramill.jobs.train.batching import PackedRows
from loramill.kernels.attention import varlen
from loramill.kernels.attention.varlen import VarlenBatch

#: Name under which `attend` is registered with transformers.
IMPLEMENTATION_NAME = "loramill_short_rows"
#: Names under which `attend_varlen` is registered, by whether its gradients are deterministic. transformers makes no
#: mask for an implementation without a function for masks.
VARLEN_NAMES = {False: "loramill_varlen", True: "loramill_varlen_deterministic"}


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V, heads that share keys together: half the time of transformers' eager code."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows, heads, tokens, width = query.shape
        q = (query * scale).reshape(rows, key.shape[1], -1, width)
        scores = q @ key.transpose(2, 3)
        scores.view(rows, heads, tokens, -1).add_(mask)
        shares = torch.softmax(scores, -1)
        ctx.save_for_backward(q, key, value, shares)
        ctx.scale, ctx.shape = scale, query.shape
        return (shares @ value).view(query.shape)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, key, value, shares = ctx.saved_tensors
        d_out = d_out.reshape(q.shape)
        d_value = shares.transpose(2, 3) @ d_out
        d_shares = d_out @ value.transpose(2, 3)
        d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
        d_query = (d_scores @ key).mul_(ctx.scale).view(ctx.shape)
        return d_query, d_scores.transpose(2, 3) @ q, d_value, None, None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the interface of transformers, for layers without attention dropout.

    Args:
        query: [rows, heads, tokens, d]; key and value are [rows, kv_heads, seen, d], of a prefix and these tokens.
        attention_mask: added to the scores, [rows, 1, tokens, seen].

    Returns:
        The output [rows, tokens, heads, d], and None for the attention weights.
    """
    out: torch.Tensor = _Attention.apply(query, key, value, attention_mask, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Which of a pass's tokens, row after row, attend to which, on the device of the pass.

    Attributes:
        own: the parts whose tokens attend to the earlier ones of the same part: the shared prefix, if there is one, and
            each example without it.
        prefix: None, or one part: the tokens of all examples, which attend to the whole shared prefix.
        prefix_tokens: tokens of the shared prefix, the first of the row.
    """

    own: VarlenBatch
    prefix: VarlenBatch | None
    prefix_tokens: int

    @classmethod
    def of(cls, rows: PackedRows, device: torch.device) -> VarlenLayout:
        """The layout of some rows."""
        prefix, lengths = rows.prefix_tokens, rows.example_tokens
        if prefix == 0:
            return cls(VarlenBatch.of(lengths, lengths, device), None, 0)
        if len(lengths) == 1:
            whole = [prefix + lengths[0]]
            return cls(VarlenBatch.of(whole, whole, device), None, 0)
        parts = [prefix, *lengths]
        return cls(
            VarlenBatch.of(parts, parts, device), VarlenBatch.of([sum(lengths)], [prefix], device), prefix_tokens=prefix
        )


class _VarlenAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V over a layout, by two launches where a prefix is shared, else by one.

    The prefix's keys are read where they are: copied to each example, as one launch would need them, they could take
    many times the memory of the row (a prefix of 4,000 tokens before 200 examples of 20). The two outputs of a token
    are averaged with the weights that their softmaxes' sums have in the whole sum (Dao et al. 2022, arXiv 2205.14135,
    section 3.1). Each launch's backward pass takes the output and the sum over all keys, and so gives its part of the
    gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: VarlenLayout,
        scale: float,
        window: int | None,
        deterministic: bool,
    ) -> torch.Tensor:
        out, logsumexp = varlen.forward(q, k, v, layout.own, scale=scale, window=window)
        if layout.prefix is not None:
            p = layout.prefix_tokens
            ahead, its_sum = varlen.forward(q[p:], k[:p], v[:p], layout.prefix, scale=scale, causal=False)
            own_sum = logsumexp[:, p:]
            share = torch.sigmoid(its_sum - own_sum).T[..., None]
            out[p:].lerp_(ahead, share.to(out.dtype))
            torch.logaddexp(own_sum, its_sum, out=own_sum)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.layout, ctx.options = layout, (scale, window, deterministic)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        layout, (scale, window, deterministic) = ctx.layout, ctx.options
        d_q, d_k, d_v = varlen.backward(
            d_out, q, k, v, out, logsumexp, layout.own, scale=scale, window=window, deterministic=deterministic
        )
        if layout.prefix is not None:
            p = layout.prefix_tokens
            own_sum = logsumexp[:, p:].contiguous()
            parts = varlen.backward(
                d_out[p:], q[p:], k[:p], v[:p], out[p:], own_sum, layout.prefix,
                scale=scale, causal=False, deterministic=deterministic,
            )  # fmt: skip
            for gradient, part in zip((d_q[p:], d_k[:p], d_v[:p]), parts, strict=True):
                gradient.add_(part)
        return d_q, d_k, d_v, None, None, None, None


def attend_varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    *,
    row_layout: VarlenLayout,
    sliding_window: int | None = None,
    deterministic: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the interface of transformers, for layers without attention dropout and soft caps.

    Args:
        query: [rows, heads, tokens, d]; key and value are [rows, kv_heads, tokens, d].
        attention_mask: None; the layout takes its place.
        row_layout: an argument of the model's forward, which transformers passes on to each layer.
        sliding_window: number of tokens that a token attends to at most. No example may be longer if the layout has a
            shared prefix.
        deterministic: compute gradients with the same bits each time.

    Returns:
        The output [rows, tokens, heads, d], and None for the attention weights.
    """
    rows, _heads, tokens, _width = query.shape
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    out: torch.Tensor = _VarlenAttention.apply(q, k, v, row_layout, scaling, sliding_window, deterministic)  # type: ignore[no-untyped-call]
    return out.view(rows, tokens, *out.shape[1:]), None


AttentionInterface.register(IMPLEMENTATION_NAME, attend)
AttentionMaskInterface.register(IMPLEMENTATION_NAME, eager_mask)
for _deterministic, _name in VARLEN_NAMES.items():
    AttentionInterface.register(_name, partial(attend_varlen, deterministic=_deterministic))
