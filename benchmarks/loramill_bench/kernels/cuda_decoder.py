"""The decoder's other operations on a real GPU: norms, gates, rotation with paging, and adapters of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from loramill.kernels import reference
from loramill.kernels.adapters.packing import LOOKUP, Delta, Site
from loramill.kernels.backend import Activation, Backend, HeadNorms, LayerKV
from loramill.kernels.batch import Batch
from loramill.kernels.paging import KVSpan, Pages
from loramill_bench.kernels.cuda import LIMITS, Check, captured, filled_slab

#: Widths of rows: odd, SmolLM2's, Llama 3 8B's and 70B's.
WIDTHS = (100, 576, 4096, 8192)
#: Query heads, KV heads and head dimension, each with and without norms: odd, SmolLM2, Llama 3 and Qwen3, Gemma.
HEADS = ((5, 1, 62), (9, 3, 64), (32, 8, 128), (16, 8, 256))
#: Widths of gates: odd, and Llama 3 8B's.
GATES = (100, 14336)
_ROWS = 9


@dataclass(frozen=True, slots=True)
class Operation:
    """A call of a backend.

    Attributes:
        name: What it is.
        arguments: Its tensors; it may change them.
        run: Calls the backend on the tensors, moved to its device; returns what it computed and changed.
    """

    name: str
    arguments: tuple[torch.Tensor, ...]
    run: Callable[..., tuple[torch.Tensor, ...]]


def check(device: str = "cuda", *, dtypes: Iterable[torch.dtype] = tuple(LIMITS)) -> Iterator[Check]:
    """Compares with the reference in float32: called and, on a GPU, replayed from a graph."""
    from loramill.kernels import triton

    for dtype in dtypes:
        for operation in (*_norms(dtype), *_gates(dtype), *_rotations(dtype)):
            wide = [tensor.to(torch.float32, copy=True) for tensor in operation.arguments]
            expected = operation.run(reference, *wide)
            for mode, got in _results(operation, triton, device):
                yield Check(operation.name, str(dtype), mode, _error(got, expected), LIMITS[dtype])
        yield from _embeddings(dtype, device)


def _results(operation: Operation, ops: Backend, device: str) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    there = [tensor.to(device, copy=True) for tensor in operation.arguments]
    yield "called", operation.run(ops, *there)
    if device == "cuda":
        results: list[tuple[torch.Tensor, ...]] = []
        graph = captured(lambda: results.append(operation.run(ops, *there)))
        for tensor, fresh in zip(there, operation.arguments, strict=True):
            tensor.copy_(fresh)
        graph.replay()
        yield "replayed", results[-1]


def _error(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest error, relative to the largest value of the same result."""
    pairs = [(mine.cpu().float(), theirs.float()) for mine, theirs in zip(got, expected, strict=True)]
    return max(((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs)


def _norms(dtype: torch.dtype) -> Iterator[Operation]:
    for width in WIDTHS:
        residual, x, weight, inner = (torch.randn(*shape, width).to(dtype) for shape in ((_ROWS,), (_ROWS,), (), ()))

        def added(ops: Backend, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            residual, x, weight, inner = tensors
            return ops.add_rms_norm(residual, x, weight, 1e-5, 1.0, inner), residual

        def plain(ops: Backend, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (ops.rms_norm(x, weight, 1e-5),)

        yield Operation(f"norm {width}", (x, weight), plain)
        yield Operation(f"norms with a residual {width}", (residual, x, weight, inner), added)


def _gates(dtype: torch.dtype) -> Iterator[Operation]:
    kinds: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for activation in kinds:

        def gated(ops: Backend, x: torch.Tensor, kind: Activation = activation) -> tuple[torch.Tensor, ...]:
            return (ops.gated_activation(x, kind),)

        for width in GATES:
            yield Operation(f"{activation} {width}", (torch.randn(_ROWS, 2 * width).to(dtype),), gated)


def _rotations(dtype: torch.dtype) -> Iterator[Operation]:
    pages = Pages.of([KVSpan(14, 4, [1, 2]), KVSpan(0, 1, [0]), KVSpan(3, 4, [3])], 16)
    for heads, kv_heads, head_dim in HEADS:
        shape = heads, kv_heads, head_dim
        qkv = torch.randn(_ROWS, (heads + 2 * kv_heads) * head_dim).to(dtype)
        cache = torch.zeros(2, 4, 16, kv_heads, head_dim, dtype=dtype)
        angles = 7 * torch.rand(_ROWS, head_dim // 2)
        norms = torch.randn(2, head_dim).to(dtype)

        def rotated(
            ops: Backend, *tensors: torch.Tensor, shape: tuple[int, int, int] = shape, pages: Pages = pages
        ) -> tuple[torch.Tensor, ...]:
            qkv, cache, angles, *norms = tensors
            heads, kv_heads, head_dim = shape
            kv = LayerKV(cache[0], cache[1], 16, kv_heads, head_dim)
            of_heads = HeadNorms(norms[0][0], norms[0][1], 1e-6, 1.0) if norms else None
            ops.rope_write(qkv, heads, angles.cos(), angles.sin(), kv, pages, of_heads)
            return qkv[:, : heads * head_dim], cache

        yield Operation(f"rotation {heads}+{kv_heads}x{head_dim}", (qkv, cache, angles), rotated)
        yield Operation(f"norms and rotation {heads}+{kv_heads}x{head_dim}", (qkv, cache, angles, norms), rotated)


def _embeddings(dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Of adapters in the rows' dtype and in int8, of ranks 1, 16 and 17."""
    from loramill.kernels import triton

    site = Site(500, ("embedding",), (1000,), lookup=True)
    adapters = [
        {"embedding": Delta(torch.randn(rank, 500), torch.randn(1000, rank), lookup=True)} for rank in (1, 16, 17)
    ]
    tokens, y = torch.randint(0, 500, (_ROWS,)), torch.randn(_ROWS, 1000).to(dtype)
    for of in (dtype, torch.int8):
        plain, slots = filled_slab(site, adapters, of, LOOKUP, "cpu")
        slab, _ = filled_slab(site, adapters, of, triton.layout, device)
        batch = Batch.of([(slots[0], 1), (None, 2), (slots[1], 3), (slots[2], 3)])
        expected, got = y.float(), y.to(device, copy=True)
        reference.adapt_embedding(tokens, expected, plain.views[0], batch, 1.5)
        triton.adapt_embedding(tokens.to(device), got, slab.views[0], batch, 1.5)
        yield Check(f"embedding, adapters in {of}", str(dtype), "called", _error((got,), (expected,)), LIMITS[dtype])
