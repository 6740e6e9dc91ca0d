"""Runs a model's first, slow steps before the first request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from loramill.kernels import Batch, Delta, LayerKV, PackedAdapter, Slab, Slot
from loramill.serve.engine.ahead import PendingTokens
from loramill.serve.engine.sampling.device_sampler import DeviceSampler
from loramill.serve.engine.sampling.logprobs import token_logprobs
from loramill.serve.engine.sampling.sampler import Sampler
from loramill.serve.engine.types import EngineConfig
from loramill.serve.model import Chunk, Model
from loramill.serve.sampling_params import SamplingParams

#: The rank of an adapter whose job sets none.
DEFAULT_RANK = 16


def warm_up(
    model: Model, cache: Sequence[LayerKV], slab: Slab, config: EngineConfig, ranks: Sequence[int] = (DEFAULT_RANK,)
) -> None:
    """Runs a model on arbitrary tokens; on a GPU also with adapters, which are zeros.

    Afterwards weights are in memory, kernels are compiled and the GPU graphs of all numbers of decodes are captured. On
    two CPU cores a first step took up to 0.33 s, the next ones 0.04 s. On a GPU, the first request with an adapter
    would wait for 10 to 14 compilations of 0.3 to 2 s, and for a graph.

    Args:
        model: The model to be served.
        cache: Empty; its first blocks are written to.
        slab: Empty, also afterwards.
        config: The limits of a step.
        ranks: The ranks of adapters to expect.
    """
    expected = (0, *sorted(set(ranks))) if model.asynchronous else (0,)

    def run_steps() -> None:
        for rank in expected:
            with _slot_of_zeros(slab, rank) as slot:
                if rank and slot is None:
                    continue
                for chunks in _steps(config, model):
                    rows = sum(len(chunk.tokens) for chunk in chunks)
                    model.forward(chunks, cache, slab, Batch.of([(slot, rows)]))

    model.prepare(run_steps)


def warm_up_sampling(sampler: DeviceSampler, rows: int, vocabulary: int, device: torch.device) -> None:
    """Samples `rows` tokens in every way, so that kernels are loaded, and the largest tensors have been allocated."""
    logits = torch.zeros(rows, vocabulary, device=device)
    everything = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1,
        logit_bias=((0, 1.0),), stop_ids=(0,), min_tokens=1,
    )  # fmt: skip
    for params in (SamplingParams(), SamplingParams(temperature=1.0), everything):
        mask = _AnyToken(vocabulary) if params is everything else None
        samplers = [Sampler(params, (0,), index, mask) for index in range(rows)]
        PendingTokens(sampler.sample(logits, samplers)).read()
    token_logprobs(logits, [0] * rows, [1] * rows)


class _AnyToken:
    """A mask that allows every token."""

    finished = False
    error = None

    def __init__(self, vocabulary: int) -> None:
        self._bits = np.full(-(-vocabulary // 8), 255, np.uint8)

    def allowed_bits(self) -> npt.NDArray[np.uint8]:
        return self._bits

    def accept(self, token: int) -> None:
        pass


def _steps(config: EngineConfig, model: Model) -> Iterator[list[Chunk]]:
    """The longest chunk of a prompt, then 1, 2, 4, … decodes at once, up to the number that may run.

    On a GPU the most decodes come first, whose graph's memory then suffices for the others; there are shorter prompts,
    for which other kernels are compiled, and one together with a decode.
    """
    blocks = range(config.kv_tokens // config.block_size)
    longest = min(config.max_batch_tokens, model.context_length, len(blocks) * config.block_size)
    yield [Chunk([0] * longest, 0, blocks, 1)]
    maximum = min(config.max_sequences, config.max_batch_tokens, len(blocks))
    counts = [*(2**power for power in range((maximum - 1).bit_length())), maximum]
    if model.asynchronous:
        for length in (length for length in (1024, 256, 64, 16, 2) if length < longest):
            yield [Chunk([0] * length, 0, blocks, 1)]
        if longest > config.block_size and len(blocks) > 1:
            prompt = Chunk([0] * config.block_size, 0, blocks[:1], 1)
            yield [prompt, Chunk([0], 0, blocks[1:2], 1)]
        counts = sorted({*counts, *(count for count in (24, 48, 96, 192, 384) if count < maximum)}, reverse=True)
    for count in counts:
        yield [Chunk([0], 0, [block], 1) for block in blocks[:count]]


@contextmanager
def _slot_of_zeros(slab: Slab, rank: int) -> Iterator[Slot | None]:
    """The slot of an adapter of zeros; None for rank 0, and if the slab has no room."""
    adapter = _zero_adapter(slab, rank) if rank else None
    slot = None if adapter is None else slab.allocate(adapter.bytes)
    if adapter is None or slot is None:
        yield None
        return
    try:
        slab.load(slot, adapter)
        yield slot
    finally:
        slab.free(slot)


def _zero_adapter(slab: Slab, rank: int) -> PackedAdapter:
    """An adapter of zeros at every linear but the head; its modules share the bytes of the site that needs the most."""
    packed: dict[tuple[int, tuple[int, ...]], tuple[int, PackedAdapter]] = {}
    table: npt.NDArray[np.int64] = slab.pack({}).table.copy()
    for index, site in enumerate(slab.sites):
        if site.lookup or site.head:
            continue
        shape = site.d_in, site.widths
        if shape not in packed:
            deltas = {
                module: Delta(torch.zeros(rank, site.d_in), torch.zeros(width, rank))
                for module, width in zip(site.modules, site.widths, strict=True)
            }
            packed[shape] = index, slab.pack(deltas)
        first, adapter = packed[shape]
        table[index] = adapter.table[first]
    size = max((adapter.bytes for _, adapter in packed.values()), default=0)
    return PackedAdapter(torch.zeros(size, dtype=torch.uint8), table)
