"""Decode steps of the base, compared with the limits of the machine's memory bandwidth and arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramill.kernels import Batch, backend
from loramill.pipelines.compare.timing import Effort, interleaved, pure_read
from loramill.serve.model import Chunk, Decoder
from loramill_bench.engine.driver import decoding_engine
from loramill_bench.engine.harness import Harness
from loramill_bench.engine.shapes import kv_bytes, weight_count
from loramill_bench.kernels import linear
from loramill_bench.results import Result

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A decode step of `batch` sequences of `context` tokens; `target` is its maximum time relative to the limit."""

    batch: int
    context: int
    target: float

    @property
    def name(self) -> str:
        """Name with the numbers of sequences and of their tokens."""
        return f"step {self.batch}x{self.context}"


CASES = (DecodeStep(1, 64, 1.25), DecodeStep(32, 64, 1.5), DecodeStep(1, 512, 1.25), DecodeStep(32, 512, 1.5))


def measure(harness: Harness, case: DecodeStep, rounds: int) -> list[Result]:
    """Measures the engine's step, including sampling, and the decoder's forward alone."""
    step_rounds = max(1, rounds // 2)
    mean_context = case.context + step_rounds // 2
    decoder = harness.decoder
    products = linear.peak_candidates(backend(), harness.linears)
    with decoding_engine(harness, [None] * case.batch, case.context, step_rounds) as engine:
        variants: dict[str, Callable[[], object]] = {
            "step": engine.step,
            "forward": _forward(decoder, case.batch, mean_context),
            "read": pure_read(_bytes_read(decoder, case.batch, mean_context)),
            **{name: product.run for name, product in products.items()},
        }
        spent = interleaved(variants, Effort(0, step_rounds))
    arithmetic = _operations(decoder, case.batch, mean_context) / linear.peak(products, spent)
    limit = max(spent["read"], arithmetic)
    return [
        Result(f"{case.name}: engine", spent["step"] / limit, "of its limit", case.target),
        Result(f"{case.name}: forward", spent["forward"] / limit, "of its limit"),
        Result(f"{case.name}: decode", case.batch / spent["step"], "tokens/s", better="higher"),
    ]


def _bytes_read(decoder: Decoder, batch: int, context: int) -> int:
    """Bytes that a step reads: weights, keys and values."""
    return weight_count(decoder) * decoder.dtype.itemsize + batch * context * kv_bytes(decoder)


def _operations(decoder: Decoder, batch: int, context: int) -> int:
    """Floating-point operations of a step, in its linears, head and attention."""
    c = decoder.config
    return 2 * batch * (weight_count(decoder) + 2 * c.layers * context * c.heads * c.head_dim)


def _forward(decoder: Decoder, batch: int, context: int) -> Callable[[], object]:
    """The decoder's forward of a step. The cache is filled: pages that were never written share one physical page."""
    blocks = -(-(context + 1) // _BLOCK)
    keys_and_values = decoder.new_cache(batch * blocks, _BLOCK)
    for kv in keys_and_values:
        kv.keys.normal_()
        kv.values.normal_()
    slab = decoder.new_slab(1, 1)
    chunks = [Chunk([1], context, range(first, first + blocks), 1) for first in range(0, batch * blocks, blocks)]

    def forward() -> torch.Tensor:
        return decoder.forward(chunks, keys_and_values, slab, Batch.of([(None, batch)]))

    return forward
