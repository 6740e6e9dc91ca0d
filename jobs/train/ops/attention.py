"""Attention for training: part by part on a CPU, and over packed rows without a mask on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loramill.jobs.train.batching import PackedRows
from loramill.kernels.attention import varlen
from loramill.kernels.attention.varlen import VarlenBatch

#: Up to this many tokens per row, plain matrix products beat torch's fused attention on a CPU (1.3x per step).
MAX_EAGER_TOKENS = 512

#: transformers' plain attention in the module of each model.
_EAGER = "eager_attention_forward"

#: Name under which `attend_parts` is registered with transformers.
PARTS_NAME = "loramill_parts"
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
class PartsLayout:
    """The parts of a pass, whose tokens follow one another, row after row, in one row.

    Attributes:
        parts: the rows of each part.
        masks: what is added to the scores of a part, [R, 1, T, T], by number of the part and window.
    """

    parts: Sequence[PackedRows]
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, number: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The mask of a part: 0 where a token attends to another, else -inf."""
        key = number, window
        if key not in self.masks:
            self.masks[key] = self.parts[number].added_mask(window, dtype).to(device)
        return self.masks[key]


def attend_parts(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    *,
    row_layout: PartsLayout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the interface of transformers; each part computes as it would alone, to the bit.

    Args:
        query: [1, heads, tokens, d]; key and value are [1, kv_heads, tokens, d].
        attention_mask: None; the layout takes its place.
        row_layout: an argument of the model's forward, which transformers passes on to each layer.
        sliding_window: number of positions that a token attends to at most, its own included.

    Returns:
        The output [1, tokens, heads, d], and None for the attention weights.
    """
    pieces, start = [], 0
    for number, part in enumerate(row_layout.parts):
        shape = part.tokens.shape
        stop = start + shape.numel()
        q, k, v = (
            each[0, :, start:stop].view(-1, *shape, each.shape[-1]).transpose(0, 1) for each in (query, key, value)
        )
        mask = row_layout.mask(number, sliding_window, query.dtype, query.device)
        if softcap is None and shape[1] <= MAX_EAGER_TOKENS:
            out, _ = attend(module, q, k, v, mask, scaling)
        else:
            out, _ = _transformers_attention(module, softcap)(
                module, q, k, v, mask, scaling=scaling, softcap=softcap, **more
            )
        pieces.append(out.flatten(0, 1))
        start = stop
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None], None


def _transformers_attention(module: nn.Module, softcap: float | None) -> Callable[..., tuple[torch.Tensor, Any]]:
    """torch's fused attention; for scores with a cap, which it lacks, the module's eager one."""
    forward: Callable[..., tuple[torch.Tensor, Any]]
    forward = sdpa_attention_forward if softcap is None else vars(sys.modules[type(module).__module__])[_EAGER]
    return forward


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The prefix that a part's examples share: all of their tokens attend to all of its tokens.

    Attributes:
        rows, keys: the tokens of the examples and of the prefix among those of the pass.
        batch: the two as one sequence.
    """

    rows: slice
    keys: slice
    batch: VarlenBatch


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Which of a pass's tokens, part after part and row after row, attend to which, on the device of the pass.

    Attributes:
        own: the sequences whose tokens attend to the earlier ones of the same sequence: the shared prefix of a part, if
            there is one, and each example without it.
        prefixes: the shared prefixes.
    """

    own: VarlenBatch
    prefixes: tuple[SharedPrefix, ...]

    @classmethod
    def of(cls, parts: Sequence[PackedRows], device: torch.device) -> VarlenLayout:
        """The layout of some parts."""
        own: list[int] = []
        prefixes: list[SharedPrefix] = []
        for part in parts:
            prefix, lengths, start = part.prefix_tokens, part.example_tokens, sum(own)
            if len(lengths) == 1:
                own.append(prefix + lengths[0])
            elif prefix == 0:
                own += lengths
            else:
                own += [prefix, *lengths]
                rows, keys = slice(start + prefix, sum(own)), slice(start, start + prefix)
                batch = VarlenBatch.of([sum(lengths)], [prefix], device)
                prefixes.append(SharedPrefix(rows, keys, batch))
        return cls(VarlenBatch.of(own, own, device), tuple(prefixes))


class _VarlenAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V over a layout, by one launch, and one more for each shared prefix.

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
        for prefix in layout.prefixes:
            rows, keys = prefix.rows, prefix.keys
            ahead, its_sum = varlen.forward(q[rows], k[keys], v[keys], prefix.batch, scale=scale, causal=False)
            own_sum = logsumexp[:, rows]
            share = torch.sigmoid(its_sum - own_sum).T[..., None]
            out[rows].lerp_(ahead, share.to(out.dtype))
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
        for prefix in layout.prefixes:
            rows, keys = prefix.rows, prefix.keys
            parts = varlen.backward(
                d_out[rows], q[rows], k[keys], v[keys], out[rows], logsumexp[:, rows].contiguous(), prefix.batch,
                scale=scale, causal=False, deterministic=deterministic,
            )  # fmt: skip
            for gradient, part in zip((d_q[rows], d_k[keys], d_v[keys]), parts, strict=True):
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


AttentionInterface.register(PARTS_NAME, attend_parts)
for _deterministic, _name in VARLEN_NAMES.items():
    AttentionInterface.register(_name, partial(attend_varlen, deterministic=_deterministic))
