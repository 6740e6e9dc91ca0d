"""A decode step's paged attention in all layers, against reading its keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loramill.kernels.backend import Backend, LayerKV
from loramill.kernels.paging import KVSpan, Pages
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill_bench.kernels.model import Model
from loramill_bench.measure import Result

_BATCH, _CONTEXT, _BLOCK = 32, 512, 16
_DTYPE = torch.bfloat16


def measure(kernels: Backend, model: Model, effort: Effort) -> list[Result]:
    """One new position in each of 32 sequences of 512: blocks taken in turn as all of them grew, or in any order."""
    own = _CONTEXT // _BLOCK
    in_turn = torch.arange(_BATCH * own).view(own, _BATCH).T
    shuffled = torch.randperm(_BATCH * own).view(_BATCH, own)
    size = 2 * model.layers * _BATCH * _CONTEXT * model.kv_heads * model.head_dim * _DTYPE.itemsize
    variants = {
        "": _attend(kernels, model, in_turn),
        ", blocks in any order": _attend(kernels, model, shuffled),
        "read": pure_read(size),
    }
    spent = interleaved(variants, effort)
    read = spent.pop("read")
    return [Result(f"attention {_BATCH}x{_CONTEXT}{how}", t / read, "of pure read", 1.5) for how, t in spent.items()]


def _attend(kernels: Backend, model: Model, blocks: torch.Tensor) -> Callable[[], object]:
    """One step's attention in all layers over sequences with these blocks [sequences, blocks]."""
    cache = kernels.new_kv(model.layers, blocks.numel(), _BLOCK, model.kv_heads, model.head_dim, _DTYPE)
    _fill(kernels, model, cache, Pages.of([KVSpan(0, _CONTEXT, its) for its in blocks.tolist()], _BLOCK))
    pages = Pages.of([KVSpan(_CONTEXT - 1, 1, its) for its in blocks.tolist()], _BLOCK)
    qkv = _random_qkv(model, _BATCH)
    scale = model.head_dim**-0.5

    def attend() -> None:
        for kv in cache:
            kernels.attention(qkv, model.heads, kv, pages, scale)

    return attend


def _fill(kernels: Backend, model: Model, cache: tuple[LayerKV, ...], pages: Pages) -> None:
    """Writes every position: pages of memory that were never written would all be one, and in the cache."""
    qkv = _random_qkv(model, pages.rows)
    angles = torch.rand(pages.rows, model.head_dim // 2)
    for kv in cache:
        kernels.rope_write(qkv, model.heads, angles.cos(), angles.sin(), kv, pages)


def _random_qkv(model: Model, rows: int) -> torch.Tensor:
    return torch.randn(rows, (model.heads + 2 * model.kv_heads) * model.head_dim, dtype=_DTYPE)
