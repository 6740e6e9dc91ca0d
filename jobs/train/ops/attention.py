"""Attention for training: part by part on a CPU, and over packed rows without a mask on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loramill.jobs.train.batching import PackedRows
from loramill.kernels.attention import varlen
from loramill.kernels.attention.varlen import VarlenBatch
from loramill.kernels.products import product

#: Up to this many tokens per row, plain matrix products beat torch's fused attention on a CPU (1.3x per step).
MAX_EAGER_TOKENS = 512

#: transformers' plain attention in the module of each model.
_EAGER = "eager_attention_forward"

#: Name under which `attend_parts` is registered with transformers.
PARTS_NAME = "loramill_parts"
#: Names under which `attend_varlen` is registered, by whether its gradients are deterministic. transformers makes no
#: mask for an implementation without a function for masks.
VARLEN_NAMES = {False: "loramill_varlen", True: "loramill_varlen_deterministic"}


@dataclass(frozen=True, slots=True)
class EqualParts:
    """Neighboring parts of one shape, which are computed together.

    Attributes:
        first, stop: numbers of the first part, and of the one after the last.
        start: the first part's first token among those of the pass.
        rows, width: shape of the parts' tokens, the rows of all.
    """

    first: int
    stop: int
    start: int
    rows: int
    width: int

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """Their tokens of [1, heads, tokens, d], as [rows, heads, width, d]."""
        own = whole[0, :, self.start : self.start + self.rows * self.width]
        return own.view(len(own), self.rows, self.width, -1).transpose(0, 1)

    def put(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Writes their [rows, kv_heads, heads of one * width, d] to [tokens, heads, d]."""
        place = whole[self.start : self.start + self.rows * self.width].view(self.rows, self.width, *whole.shape[1:])
        place.copy_(own.reshape(self.rows, -1, self.width, own.shape[-1]).transpose(1, 2))


@dataclass(frozen=True)
class PartsLayout:
    """The parts of a pass, whose tokens follow one another, row after row, in one row.

    Attributes:
        parts: the rows of each part.
        together: whether neighboring parts of one shape are computed by one batch of products. In bfloat16, oneDNN
            gives a product the same bits in any batch; in float32, MKL does not.
        masks: what is added to the scores of a group, [rows, 1, width, width], by its first part and the window.
    """

    parts: Sequence[PackedRows]
    together: bool = False
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def groups(self) -> tuple[EqualParts, ...]:
        """The parts in groups."""
        groups, number, start = [], 0, 0
        shapes = ((part.tokens.shape, 0 if self.together else index) for index, part in enumerate(self.parts))
        for (shape, _), equal in groupby(shapes):
            count = len(list(equal))
            groups.append(EqualParts(number, number + count, start, count * shape[0], shape[1]))
            number, start = number + count, start + count * shape.numel()
        return tuple(groups)

    @cached_property
    def singles(self) -> tuple[PartsLayout, ...]:
        """The layout of each part by itself."""
        return tuple(PartsLayout([part]) for part in self.parts)

    def mask(self, group: EqualParts, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The mask of a group: 0 where a token attends to another, else -inf."""
        key = group.first, window
        if key not in self.masks:
            parts = self.parts[group.first : group.stop]
            self.masks[key] = torch.cat([part.added_mask(window, dtype) for part in parts]).to(device)
        return self.masks[key]


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V, heads that share keys together: half the time of transformers' eager code.

    It computes all parts of a pass, so that autograd does not make and add one gradient of all tokens per part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PartsLayout,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        scaled, groups = query * scale, layout.groups
        saved: list[torch.Tensor] = []
        out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        for group in groups:
            k, v = group.take(key), group.take(value)
            q = group.take(scaled).reshape(len(k), k.shape[1], -1, k.shape[3])
            scores = product(q, k.transpose(2, 3))
            mask = layout.mask(group, window, q.dtype, q.device)
            scores.view(len(k), -1, group.width, group.width).add_(mask)
            shares = torch.softmax(scores, -1)
            group.put(out, product(shares, v))
            saved += (q, k, v, shares)
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.scale = groups, scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, tokens, heads, width = d_out.shape
        saved = ctx.saved_tensors
        kv_heads = saved[1].shape[1]
        d_query, d_key, d_value = (d_out.new_empty(tokens, n, width) for n in (heads, kv_heads, kv_heads))
        for number, group in enumerate(ctx.groups):
            q, k, v, shares = saved[4 * number : 4 * number + 4]
            back = group.take(d_out.transpose(1, 2)).reshape(q.shape)
            group.put(d_value, product(shares.transpose(2, 3), back))
            d_scores = torch._softmax_backward_data(product(back, v.transpose(2, 3)), shares, -1, shares.dtype)
            group.put(d_query, product(d_scores, k))
            group.put(d_key, product(d_scores.transpose(2, 3), q))
        gradients = (d_query.mul_(ctx.scale), d_key, d_value)
        return *(each.transpose(0, 1)[None] for each in gradients), None, None, None


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

    def plainly(layout: PartsLayout, *inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Attention.apply(*inputs, layout, sliding_window, scaling)  # type: ignore[no-untyped-call]
        return out

    if softcap is None and max(group.width for group in row_layout.groups) <= MAX_EAGER_TOKENS:
        return plainly(row_layout, query, key, value), None
    theirs = partial(_transformers_attention(module, softcap), module, scaling=scaling, softcap=softcap, **more)
    outputs = []
    sizes = [part.tokens.numel() for part in row_layout.parts]
    pieces = zip(*(torch.split(each, sizes, dim=2) for each in (query, key, value)), strict=True)
    for layout, own in zip(row_layout.singles, pieces, strict=True):
        [group] = layout.groups
        if softcap is None and group.width <= MAX_EAGER_TOKENS:
            outputs.append(plainly(layout, *own))
        else:
            mask = layout.mask(group, sliding_window, query.dtype, query.device)
            outputs.append(theirs(*map(group.take, own), mask)[0].flatten(0, 1)[None])
    return torch.cat(outputs, dim=1), None


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
