"""A model's first steps, taken before anybody waits for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loramill.kernels import Batch, LayerKV, Slab
from loramill.serve.engine.types import EngineConfig
from loramill.serve.model import Chunk, Model


def warm_up(model: Model, cache: Sequence[LayerKV], slab: Slab, config: EngineConfig) -> None:
    """Runs a model as the base alone, on tokens that mean nothing.

    Weights are then in memory, kernels compiled and the GPU graphs of these sizes captured. On two cores of a CPU a
    first step took up to 0.33 s, the next ones 0.04 s.

    Args:
        model: to be served.
        cache: empty; its first blocks are written to.
        slab: of any adapters.
        config: how much goes into one step.
    """
    for chunks in _steps(config, model.context_length):
        model.forward(chunks, cache, slab, Batch.of([(None, sum(len(chunk.tokens) for chunk in chunks))]))


def _steps(config: EngineConfig, context_length: int) -> Iterator[list[Chunk]]:
    """The longest piece of a prompt, then 1, 2, 4, … answers at once, up to as many as may run."""
    blocks = range(config.kv_tokens // config.block_size)
    longest = min(config.max_batch_tokens, context_length, len(blocks) * config.block_size)
    yield [Chunk([0] * longest, 0, blocks, 1)]
    most = min(config.max_sequences, config.max_batch_tokens, len(blocks))
    for count in (*(2**power for power in range((most - 1).bit_length())), most):
        yield [Chunk([0], 0, [block], 1) for block in blocks[:count]]
