"""Attention on a real GPU: correctness in every dtype, and decodes' time compared with reading keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from loramill.kernels import reference, torch_backend
from loramill.kernels.backend import LayerKV
from loramill.kernels.paging import KVSpan, Pages
from loramill_bench.kernels.cuda import LIMITS, Check, captured, copy_bandwidth, median_us

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A decode step of sequences of equal length, and optionally a longer one; lengths are those after the step."""

    sequences: int
    length: int
    longest: int | None = None

    @property
    def lengths(self) -> list[int]:
        """The lengths of all sequences."""
        return [self.length] * self.sequences + ([] if self.longest is None else [self.longest])

    def __str__(self) -> str:
        return f"{self.sequences}x{self.length}" + ("" if self.longest is None else f"+{self.longest}")


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one layer, in microseconds.

    Attributes:
        us: Time of the kernels.
        floor_us: Time of copying as many bytes as the keys and values have.
        gather_us: Time of gathering them for torch's scaled_dot_product_attention, which is included.
    """

    us: float
    floor_us: float
    gather_us: float


#: Decodes of Llama-3-8B.
CASES = (Case(1, 8192), Case(8, 2048), Case(32, 1024), Case(128, 512), Case(127, 512, 32768))
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128

#: Cases of `check`: lengths, query heads per KV head, head dimension, window.
CHECKED: tuple[tuple[tuple[int, ...], int, int, int | None], ...] = (
    ((1, 16, 17, 600), 3, 64, None),
    ((5, 130, 64, 33, 2000), 4, 128, None),
    ((257, 80, 3), 8, 80, 100),
    ((70, 1000), 1, 256, 64),
    ((300, 41), 20, 128, None),
)


def check(device: str = "cuda", *, dtypes: Iterable[torch.dtype] = tuple(LIMITS)) -> Iterator[Check]:
    """Compares decodes with the reference in float32, called and, on a GPU, replayed from a graph; and prefills."""
    for dtype in dtypes:
        for lengths, group, head_dim, window in CHECKED:
            kv, decodes = _filled(lengths, 2, head_dim, dtype, "cpu")
            wide = LayerKV(kv.keys.float(), kv.values.float(), kv.block_size, kv.kv_heads, kv.head_dim)
            there = LayerKV(kv.keys.to(device), kv.values.to(device), kv.block_size, kv.kv_heads, kv.head_dim)
            for pages, run in ((decodes, _decoded), (_prefills(decodes), _prefilled)):
                qkv = torch.randn(pages.rows, (2 * group + 4) * head_dim).to(dtype)
                shape = (pages, head_dim**-0.5, window)
                expected = reference.attention(qkv.float(), 2 * group, wide, *shape)
                for mode, got in run(qkv.to(device), 2 * group, there, *shape):
                    error = (got.cpu().float() - expected).abs().max() / expected.abs().max()
                    case = f"{mode}: {lengths}, window {window}"
                    yield Check(f"attention {group}x{head_dim}", str(dtype), case, error.item(), LIMITS[dtype])


def _prefills(decodes: Pages) -> Pages:
    """The same sequences with more and more new rows, from one on."""
    counts = [min(span.stop, 1 + 9 * number) for number, span in enumerate(decodes.spans)]
    spans = zip(decodes.spans, counts, strict=True)
    return Pages.of([KVSpan(span.stop - count, count, span.block_table) for span, count in spans], _BLOCK)


def _prefilled(
    qkv: torch.Tensor, heads: int, kv: LayerKV, pages: Pages, scale: float, window: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    from loramill.kernels import triton

    yield "prefills", triton.attention(qkv, heads, kv, pages, scale, window)


def _decoded(
    qkv: torch.Tensor, heads: int, kv: LayerKV, pages: Pages, scale: float, window: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    from loramill.kernels import triton

    yield "called", triton.attention(qkv, heads, kv, pages, scale, window)
    rows, scratch = len(qkv) + 3, len(kv.keys) - 1
    static = triton.StaticPages(
        rows=rows, blocks=len(pages.blocks) + 5, block_size=_BLOCK, scratch=scratch, device=qkv.device
    )
    padded = torch.cat([qkv, torch.zeros_like(qkv[:1]).expand(3, -1)])
    results: list[torch.Tensor] = []

    def attend() -> None:
        results[:] = [triton.attention(padded, heads, kv, static.pages, scale, window)]

    replay = captured(attend).replay if qkv.is_cuda else attend
    static.refresh(pages)
    replay()
    yield "replayed", results[0][: len(qkv)]


def timing(case: Case) -> Timing:
    """Times a case on the current GPU, in bfloat16."""
    from loramill.kernels import triton

    kv, pages = _filled(case.lengths, _KV_HEADS, _HEAD_DIM, torch.bfloat16, "cuda")
    columns = (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM
    qkv = torch.randn(len(case.lengths), columns, dtype=torch.bfloat16, device="cuda")
    attend = [partial(ops.attention, qkv, _HEADS, kv, pages, _HEAD_DIM**-0.5) for ops in (triton, torch_backend)]
    size = 2 * sum(case.lengths) * _KV_HEADS * _HEAD_DIM * qkv.itemsize
    return Timing(median_us(attend[0]), size / copy_bandwidth() * 1e6, median_us(attend[1]))


def _filled(
    lengths: Sequence[int], kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[LayerKV, Pages]:
    """Random keys and values of sequences with shuffled blocks, and one more block at the end."""
    counts = [-(-length // _BLOCK) for length in lengths]
    order = iter(torch.randperm(sum(counts)).tolist())
    spans = [KVSpan(length - 1, 1, list(islice(order, count))) for length, count in zip(lengths, counts, strict=True)]
    shape = (sum(counts) + 1, _BLOCK, kv_heads, head_dim)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return LayerKV(keys, values, _BLOCK, kv_heads, head_dim), Pages.of(spans, _BLOCK)
