"""A decode step of the base, against what the machine's memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramill.kernels import Batch, backend
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill.serve.model import Chunk, Decoder
from loramill_bench.engine.load import decoding
from loramill_bench.engine.shapes import kv_bytes, weight_count
from loramill_bench.engine.subject import Subject
from loramill_bench.kernels import linear
from loramill_bench.measure import Result

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Point:
    """Sequences, and the tokens that each has; how many times its limit a step may take."""

    batch: int
    context: int
    target: float

    @property
    def name(self) -> str:
        """Sequences and their tokens."""
        return f"step {self.batch}x{self.context}"


CASES = (Point(1, 64, 1.25), Point(32, 64, 1.5), Point(1, 512, 1.25), Point(32, 512, 1.5))


def measure(subject: Subject, point: Point, rounds: int) -> list[Result]:
    """The engine's step, sampling included, and the decoder's forward alone."""
    few = max(1, rounds // 2)
    halfway = point.context + few // 2
    decoder = subject.decoder
    products = linear.products(backend(), subject.linears)
    with decoding(subject, [None] * point.batch, point.context, few) as engine:
        variants: dict[str, Callable[[], object]] = {
            "step": engine.step,
            "forward": _forward(decoder, point.batch, halfway),
            "read": pure_read(_bytes(decoder, point.batch, halfway)),
            **{name: product.run for name, product in products.items()},
        }
        spent = interleaved(variants, Effort(0, few))
    arithmetic = _operations(decoder, point.batch, halfway) / linear.peak(products, spent)
    limit = max(spent["read"], arithmetic)
    return [
        Result(f"{point.name}: engine", spent["step"] / limit, "of its limit", point.target),
        Result(f"{point.name}: forward", spent["forward"] / limit, "of its limit"),
        Result(f"{point.name}: decode", point.batch / spent["step"], "tokens/s", better="higher"),
    ]


def _bytes(decoder: Decoder, batch: int, context: int) -> int:
    """That a step reads: weights, keys and values."""
    return weight_count(decoder) * decoder.dtype.itemsize + batch * context * kv_bytes(decoder)


def _operations(decoder: Decoder, batch: int, context: int) -> int:
    """Of a step, in its linears, its head and its attention."""
    c = decoder.config
    return 2 * batch * (weight_count(decoder) + 2 * c.layers * context * c.heads * c.head_dim)


def _forward(decoder: Decoder, batch: int, context: int) -> Callable[[], object]:
    """What the engine calls for a step, over a cache that was written: else its pages would all be one."""
    own = -(-(context + 1) // _BLOCK)
    keys_and_values = decoder.new_cache(batch * own, _BLOCK)
    for kv in keys_and_values:
        kv.keys.normal_()
        kv.values.normal_()
    slab = decoder.new_slab(1, 1)
    chunks = [Chunk([1], context, range(first, first + own), 1) for first in range(0, batch * own, own)]

    def forward() -> torch.Tensor:
        return decoder.forward(chunks, keys_and_values, slab, Batch.of([(None, batch)]))

    return forward
