"""The CPU time of a step on a GPU besides the model: what the host does while the device may have to wait for it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

import torch

from loramill.kernels import Batch, LayerKV, Pages, Slab
from loramill.serve.engine import Engine, EngineConfig, Request
from loramill.serve.model import Chunk, Decoder
from loramill.serve.model.graphs import GraphedDecoder
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.engine.harness import Harness
from loramill_bench.results import Result

_CONTEXT = 256
_STEPS_PER_ROUND = 25
#: Few, so that sampling costs no more than its launches do on a GPU.
_VOCABULARY = 16


@dataclass(frozen=True, slots=True)
class HostTime:
    """Decode steps of a batch of sequences, over as many adapters as there are, with one tenant per adapter."""

    batch: int
    target_ms: float | None = None

    @property
    def name(self) -> str:
        """Name with the number of sequences."""
        return f"host time {self.batch}"


#: The paging and the adapters' tiles are those of Triton, which not every machine has.
CASES = (HostTime(1), HostTime(32, 0.4), HostTime(128, 1.0)) if importlib.util.find_spec("triton") else ()


def measure(harness: Harness, case: HostTime, rounds: int) -> list[Result]:
    """The 20th percentile of the thread's CPU time per step; other processes' use of the caches affects it little.

    The steps take the path of a GPU: a pass ahead, from a graph, and sampling on the device. The device is the CPU, on
    which the model's kernels are left out; the driver's part of copies and launches is not included.
    """
    steps, count = _STEPS_PER_ROUND * rounds, len(harness.adapters)
    config = EngineConfig(
        max_sequences=case.batch,
        max_batch_tokens=case.batch * _CONTEXT,
        kv_tokens=case.batch * (_CONTEXT + 2 * steps),
        adapter_slots=count,
        adapter_bytes=count * 16 << 20,
    )
    model = GraphedDecoder(_CostlessDecoder(harness.decoder, case.batch), capture=_replayed)
    engine = Engine(model, harness.source, config)
    try:
        driver = EngineDriver(engine)
        versions = [str(row % count) for row in range(case.batch)]
        driver.run(_requests(harness, sorted(set(versions)), 1, 1))
        driver.run_to_first_tokens(_requests(harness, versions, _CONTEXT, 2 * steps))
        spent = [_cpu_seconds(engine.step) for _ in range(steps)]
    finally:
        engine.close()
    return [Result(f"{case.name}: step", quantiles(spent, n=5)[0] * 1e3, "ms", case.target_ms)]


def _requests(harness: Harness, versions: Sequence[str], length: int, new: int) -> list[Request]:
    return [
        replace(request, tokens=tuple(token % _VOCABULARY for token in request.tokens), tenant=version)
        for request, version in zip(harness.requests(versions, length, new), versions, strict=True)
    ]


class _CostlessDecoder(Decoder):
    """A decoder whose layers, embedding and head return what is prepared."""

    asynchronous = True

    def __init__(self, decoder: Decoder, rows: int) -> None:
        from loramill.kernels import triton

        vars(self).update(vars(decoder))
        self.vocabulary = _VOCABULARY
        self._backend = triton
        self._logits = torch.zeros(rows, _VOCABULARY)
        self._states = torch.zeros(rows * _CONTEXT, decoder.config.hidden, dtype=decoder.dtype)

    def new_cache(self, blocks: int, block_size: int) -> tuple[LayerKV, ...]:
        return self._backend.new_kv(1, blocks, block_size, 1, 1, self.dtype)

    def embed(
        self, chunks: Sequence[Chunk], slab: Slab, batch: Batch, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._states[: batch.rows]

    def layers(self, x: torch.Tensor, cache: Sequence[LayerKV], pages: Pages, slab: Slab, batch: Batch) -> torch.Tensor:
        return self._states[: len(x)]

    def head(self, h: torch.Tensor, chunks: Sequence[Chunk], slab: Slab, batch: Batch) -> torch.Tensor:
        return self._logits[: sum(chunk.logits_to_keep for chunk in chunks)]


def _replayed(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    result = run()
    return lambda: result


def _cpu_seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began
