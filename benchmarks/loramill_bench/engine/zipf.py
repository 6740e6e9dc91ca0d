"""Requests for many adapters with a Zipf distribution, in fewer slots, compared with one adapter for all requests."""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loramill.models.catalog import Base
from loramill.serve.engine import EngineConfig
from loramill.serve.model import Decoder, load_decoder
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.engine.harness import Harness, weights_file
from loramill_bench.engine.memory import resident_bytes
from loramill_bench.engine.shapes import kv_bytes, weight_count
from loramill_bench.results import Result


@dataclass(frozen=True, slots=True)
class ZipfRequests:
    """Requests that are submitted at once; the k-th version is requested 1/k as often as the first.

    Attributes:
        versions: Number of versions.
        requests: Number of requests.
        prompt: Tokens per prompt.
        new: Tokens per answer.
        sequences: Number of sequences that run at once.
        slots: Number of adapter slots.
    """

    versions: int
    requests: int
    prompt: int
    new: int
    sequences: int
    slots: int

    @property
    def name(self) -> str:
        """Name with the number of versions."""
        return f"zipf {self.versions}"


CASES = (ZipfRequests(versions=500, requests=256, prompt=64, new=32, sequences=64, slots=32),)


@dataclass(frozen=True, slots=True)
class _RunSeconds:
    """Duration of a run: CPU time of the engine's thread, and wall-clock time."""

    cpu: float
    wall: float

    def plus(self, other: _RunSeconds) -> _RunSeconds:
        """The sum of both."""
        return _RunSeconds(self.cpu + other.cpu, self.wall + other.wall)


def measure(harness: Harness, case: ZipfRequests, rounds: int) -> list[Result]:
    """Runs both twice, in a new process, so that memory left by other cases does not affect the result.

    Every run starts without loaded adapters. `rounds` is ignored.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        one, many, memory = executor.submit(_measure, harness.base, harness.adapters, case).result()
    tokens, name = 2 * case.requests * case.new, case.name
    results = [
        Result(f"{name}: speed", one.cpu / many.cpu, "of one adapter's", 0.9, "higher"),
        Result(f"{name}: speed, wall clock", one.wall / many.wall, "of one adapter's", better="higher"),
        Result(f"{name}: output throughput", tokens / many.cpu, "tokens/s", better="higher"),
        Result(f"{name}: output throughput, wall clock", tokens / many.wall, "tokens/s", better="higher"),
    ]
    if memory is not None:
        results.append(Result(f"{name}: resident memory", memory, "of the configured memory", 1.2))
    return results


def _measure(
    base: Base, adapters: tuple[Path, ...], case: ZipfRequests
) -> tuple[_RunSeconds, _RunSeconds, float | None]:
    """Returns the durations with one adapter and with many, and the peak memory divided by the configured memory.

    The memory is None if the system does not report it.
    """
    before = resident_bytes()
    decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
    harness = Harness(base, decoder, adapters)
    peak = before

    def sample() -> None:
        nonlocal peak
        peak = max(peak, resident_bytes())

    # In this order, so that a drift within a minute affects both equally.
    alike = ["0"] * case.requests
    runs = [
        _run(harness, case, versions, sample) for versions in (alike, draw_versions(case), draw_versions(case), alike)
    ]
    one, many = runs[0].plus(runs[3]), runs[1].plus(runs[2])
    return one, many, (peak - before) / _configured_bytes(decoder, _config(harness, case)) if before else None


def draw_versions(case: ZipfRequests) -> list[str]:
    """One version per request; every call returns the same versions."""
    weights = [1 / rank for rank in range(1, case.versions + 1)]
    return [str(version) for version in random.Random(0).choices(range(case.versions), weights, k=case.requests)]


def _run(
    harness: Harness, case: ZipfRequests, versions: Sequence[str], after_step: Callable[[], object] = lambda: None
) -> _RunSeconds:
    requests = harness.requests(versions, case.prompt, case.new)
    with harness.engine(_config(harness, case)) as engine:
        driver = EngineDriver(engine)
        cpu, wall = time.thread_time(), time.perf_counter()
        driver.submit(requests)
        while driver.open:
            driver.step()
            after_step()
        spent = _RunSeconds(time.thread_time() - cpu, time.perf_counter() - wall)
    del engine, driver
    # A slab and its views are a reference cycle.
    gc.collect()
    return spent


def _config(harness: Harness, case: ZipfRequests) -> EngineConfig:
    """The case's slots, with just enough memory for their adapters and the sequences, and as much host memory."""
    adapters = case.slots * weights_file(harness.adapters[0]).stat().st_size
    return EngineConfig(
        max_sequences=case.sequences,
        kv_tokens=case.sequences * (case.prompt + case.new + 16),
        adapter_slots=case.slots,
        adapter_bytes=adapters,
        host_bytes=adapters,
        max_waiting=case.requests,
    )


def _configured_bytes(decoder: Decoder, config: EngineConfig) -> int:
    """Bytes of the base and of the engine's configured memory."""
    weights = weight_count(decoder) * decoder.dtype.itemsize
    return weights + config.kv_tokens * kv_bytes(decoder) + config.adapter_bytes + config.host_bytes
