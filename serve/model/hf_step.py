"""A step through a transformers model: paged attention and adapters hook into the calls of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loramill.errors import BaseUnusable, EngineFault
from loramill.kernels import Backend, Batch, LayerKV, Pages, SiteSlab, Slab, torch_backend
from loramill.kernels.adapters.embedding import adapt_embedding, batch_of_rows

#: The name of `attend` in transformers' registry of attention functions.
ATTENTION = "loramill_paged"

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class HFStep:
    """What a model's modules need during a step.

    Attributes:
        pages: The paging.
        slab: The adapters.
        batch: The adapter of each row.
        logits_rows: The rows that need logits.
        cache: Keys and values by attention module.
    """

    pages: Pages
    slab: Slab
    batch: Batch
    logits_rows: list[int]
    cache: Mapping[nn.Module, LayerKV]

    def batch_at(self, view: SiteSlab, rows: int) -> Batch:
        """The batch of a linear that sees all rows of the step, or only those that need logits.

        Raises:
            EngineFault: The linear sees other rows, and an adapter of the step targets it.
        """
        if rows == self.batch.rows:
            return self.batch
        if rows == len(self.logits_rows):
            return batch_of_rows(self.batch, self.logits_rows, view)
        if batch_of_rows(self.batch, range(self.batch.rows), view).runs:
            raise EngineFault(
                f"'{view.site.modules[0]}' sees {rows} rows in a step of {self.batch.rows} rows and "
                f"{len(self.logits_rows)} logits: their adapters are unknown, so no adapter may target it."
            )
        return Batch(rows, ())


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The shape of one attention module; for `window` see `Backend.attention`."""

    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class ProbeStep:
    """A step that only records the attention modules, in the order of their calls."""

    attentions: dict[nn.Module, AttentionShape] = field(default_factory=dict)


_STEP: ContextVar[HFStep | ProbeStep | None] = ContextVar("step", default=None)


@contextmanager
def in_step(step: HFStep | ProbeStep) -> Iterator[None]:
    """Makes modules that are called within it belong to the step."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention.
        query: [1, heads, rows, head_dim].
        key: [1, kv_heads, rows, head_dim].
        value: Like key.
        attention_mask: None, since transformers makes no mask for a custom function.
        scaling: Factor of the scores; None: head_dim ** -0.5.
        sliding_window: Number of positions that a row sees, including its own.
        softcap: Scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: Attention sinks, which are not supported.

    Returns:
        [1, rows, heads, head_dim].
    """
    step, rows = _STEP.get(), query.shape[2]
    if isinstance(step, ProbeStep):
        if module in step.attentions or attention_mask is not None or s_aux is not None or key.shape != value.shape:
            raise BaseUnusable(
                f"The attention of {type(module).__name__} isn't supported: it has a mask, sinks, values of another "
                "width than the keys, or one module for several layers."
            )
        step.attentions[module] = AttentionShape(key.shape[1], key.shape[3], sliding_window)
        return torch.zeros_like(query).transpose(1, 2), None
    if step is None:
        raise EngineFault("The paged attention was called outside of a step.")
    kv = step.cache[module]
    slots = step.pages.on(query.device).slots
    for pages, new in ((kv.keys, key), (kv.values, value)):
        pages.flatten(0, 1).index_copy_(0, slots, new[0].transpose(0, 1).to(pages.dtype))
    q = query[0].transpose(0, 1).to(kv.keys.dtype).flatten(1)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if softcap is None:
        out = torch_backend.attention(q, query.shape[1], kv, step.pages, scale, sliding_window)
    else:
        out = _softcapped(q, kv, step.pages, scale, sliding_window, softcap)
    return out.view(1, rows, *query.shape[1::2]).to(query.dtype), None


def _softcapped(
    q: torch.Tensor, kv: LayerKV, pages: Pages, scale: float, window: int | None, softcap: float
) -> torch.Tensor:
    """`Backend.attention` with soft-capped scores, sequence by sequence and in float32."""
    queries = q.float().view(len(q), kv.kv_heads, -1, kv.head_dim)
    out = torch.empty_like(queries)
    row = 0
    for span in pages.spans:
        first = 0 if window is None else max(0, span.start + 1 - window)
        begin, end = first // pages.block_size, -(-span.stop // pages.block_size)
        blocks, positions = torch.tensor(span.block_table[begin:end]), torch.arange(begin * pages.block_size, span.stop)
        keys, values = (part[blocks].flatten(0, 1)[: len(positions)].float() for part in (kv.keys, kv.values))
        rows, own = slice(row, row + span.count), torch.arange(span.start, span.stop)[:, None]
        scores = torch.einsum("rkgd,pkd->kgrp", queries[rows], keys) * scale
        hidden = positions > own if window is None else (positions > own) | (positions <= own - window)
        weights = (softcap * (scores / softcap).tanh()).masked_fill(hidden, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("kgrp,pkd->rkgd", weights, values)
        row += span.count
    return out.flatten(1).to(q.dtype)


def adapt_linear(module: nn.Module, product: Product, bias: torch.Tensor | None, site: int, ops: Backend) -> None:
    """Makes a linear apply its rows' adapters at a site before it adds its bias, as DoRA requires."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = product(flat)
        step = _STEP.get()
        if isinstance(step, HFStep):
            view = step.slab.views[site]
            ops.lora(flat, y, view, step.batch_at(view, len(flat)))
        if bias is not None:
            y = y.add_(bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    module.forward = forward


def adapt_lookup(module: nn.Embedding, site: int) -> None:
    """Makes an embedding apply its rows' adapters at a site."""
    # If the module scales its output, as in Gemma 3, PEFT scales the adapter's, too.
    scale = getattr(module, "embed_scale", 1.0)

    def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        step = _STEP.get()
        if isinstance(step, HFStep):
            adapt_embedding(
                args[0].flatten(), output.view(-1, output.shape[-1]), step.slab.views[site], step.batch, scale
            )

    module.register_forward_hook(add)
