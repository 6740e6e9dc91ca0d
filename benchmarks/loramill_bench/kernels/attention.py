"""Paged attention of a decode step in all layers, compared with reading its keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loramill.kernels.backend import Backend, LayerKV
from loramill.kernels.paging import KVSpan, Pages
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill_bench.kernels.model import Model
from loramill_bench.results import Result

_BATCH, _CONTEXT, _BLOCK = 32, 512, 16
_DTYPE = torch.bfloat16


def measure(kernels: Backend, model: Model, effort: Effort) -> list[Result]:
    """Measures one new position of 32 sequences of 512, with blocks in order of growth and shuffled ones."""
    blocks_per_sequence = _CONTEXT // _BLOCK
    interleaved_blocks = torch.arange(_BATCH * blocks_per_sequence).view(blocks_per_sequence, _BATCH).T
    shuffled = torch.randperm(_BATCH * blocks_per_sequence).view(_BATCH, blocks_per_sequence)
    size = 2 * model.layers * _BATCH * _CONTEXT * model.kv_heads * model.head_dim * _DTYPE.itemsize
    variants = {
        "": _attend(kernels, model, interleaved_blocks),
        ", shuffled blocks": _attend(kernels, model, shuffled),
        "read": pure_read(size),
    }
    spent = interleaved(variants, effort)
    read = spent.pop("read")
    return [Result(f"attention {_BATCH}x{_CONTEXT}{how}", t / read, "of pure read", 1.5) for how, t in spent.items()]


def _attend(kernels: Backend, model: Model, blocks: torch.Tensor) -> Callable[[], object]:
    """A function that runs one step's attention in all layers, for sequences with these blocks [sequences, blocks]."""
    cache = kernels.new_kv(model.layers, blocks.numel(), _BLOCK, model.kv_heads, model.head_dim, _DTYPE)
    _fill(
        kernels,
        model,
        cache,
        Pages.of([KVSpan(0, _CONTEXT, sequence_blocks) for sequence_blocks in blocks.tolist()], _BLOCK),
    )
    pages = Pages.of([KVSpan(_CONTEXT - 1, 1, sequence_blocks) for sequence_blocks in blocks.tolist()], _BLOCK)
    qkv = _random_qkv(model, _BATCH)
    scale = model.head_dim**-0.5

    def attend() -> None:
        for kv in cache:
            kernels.attention(qkv, model.heads, kv, pages, scale)

    return attend


def _fill(kernels: Backend, model: Model, cache: tuple[LayerKV, ...], pages: Pages) -> None:
    """Writes every position: pages that were never written share one physical page, which stays in the CPU's cache."""
    qkv = _random_qkv(model, pages.rows)
    angles = torch.rand(pages.rows, model.head_dim // 2)
    for kv in cache:
        kernels.rope_write(qkv, model.heads, angles.cos(), angles.sin(), kv, pages)


def _random_qkv(model: Model, rows: int) -> torch.Tensor:
    return torch.randn(rows, (model.heads + 2 * model.kv_heads) * model.head_dim, dtype=_DTYPE)
