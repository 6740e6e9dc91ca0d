"""Many adapters, few of them much wanted and most seldom, in fewer slots: against one adapter for all requests."""

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
from loramill_bench.engine.load import Load
from loramill_bench.engine.memory import resident
from loramill_bench.engine.shapes import kv_bytes, weight_count
from loramill_bench.engine.subject import Subject, weights_file
from loramill_bench.measure import Result


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests, all submitted at once, over versions of which the k-th is asked for 1/k as often as the first.

    Attributes:
        versions: that requests may be for.
        requests: in all.
        prompt, new: tokens of each.
        sequences: that run at once.
        slots: of adapters.
    """

    versions: int
    requests: int
    prompt: int
    new: int
    sequences: int
    slots: int

    @property
    def name(self) -> str:
        """The versions."""
        return f"zipf {self.versions}"


CASES = (Traffic(versions=500, requests=256, prompt=64, new=32, sequences=64, slots=32),)


@dataclass(frozen=True, slots=True)
class _Seconds:
    """A run's: of the engine's thread, and by the clock."""

    cpu: float
    wall: float

    def and_then(self, other: _Seconds) -> _Seconds:
        """Of both."""
        return _Seconds(self.cpu + other.cpu, self.wall + other.wall)


def measure(subject: Subject, traffic: Traffic, rounds: int) -> list[Result]:
    """Two runs each, in a process of its own: what other cases have left in memory would blur how much this one takes.

    Every run begins with no adapter loaded. `rounds` has no say.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        one, many, memory = alone.submit(_measure, subject.base, subject.adapters, traffic).result()
    tokens, name = 2 * traffic.requests * traffic.new, traffic.name
    results = [
        Result(f"{name}: speed", one.cpu / many.cpu, "of one adapter's", 0.9, "higher"),
        Result(f"{name}: speed by the clock", one.wall / many.wall, "of one adapter's", better="higher"),
        Result(f"{name}: answers", tokens / many.cpu, "tokens/s", better="higher"),
        Result(f"{name}: answers by the clock", tokens / many.wall, "tokens/s", better="higher"),
    ]
    if memory is not None:
        results.append(Result(f"{name}: resident memory", memory, "of its bounds", 1.2))
    return results


def _measure(base: Base, adapters: tuple[Path, ...], traffic: Traffic) -> tuple[_Seconds, _Seconds, float | None]:
    """With one adapter, with many, and the most memory that the latter took over its bounds; None: it can't be told."""
    before = resident()
    decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
    subject = Subject(base, decoder, adapters)
    most = before

    def look() -> None:
        nonlocal most
        most = max(most, resident())

    # In this order, so that what drifts in a minute hits both alike.
    alike = ["0"] * traffic.requests
    runs = [_run(subject, traffic, versions, look) for versions in (alike, drawn(traffic), drawn(traffic), alike)]
    one, many = runs[0].and_then(runs[3]), runs[1].and_then(runs[2])
    return one, many, (most - before) / _bounds(decoder, _config(subject, traffic)) if before else None


def drawn(traffic: Traffic) -> list[str]:
    """A version a request, the same ones every time."""
    weights = [1 / place for place in range(1, traffic.versions + 1)]
    return [str(version) for version in random.Random(0).choices(range(traffic.versions), weights, k=traffic.requests)]


def _run(
    subject: Subject, traffic: Traffic, versions: Sequence[str], look: Callable[[], object] = lambda: None
) -> _Seconds:
    requests = subject.requests(versions, traffic.prompt, traffic.new)
    with subject.engine(_config(subject, traffic)) as engine:
        load = Load(engine)
        cpu, wall = time.thread_time(), time.perf_counter()
        load.submit(requests)
        while load.open:
            load.step()
            look()
        spent = _Seconds(time.thread_time() - cpu, time.perf_counter() - wall)
    del engine, load
    # A slab and its views refer to each other.
    gc.collect()
    return spent


def _config(subject: Subject, traffic: Traffic) -> EngineConfig:
    """As many slots as the traffic says, just enough room for them and their sequences, and as much on the host."""
    adapters = traffic.slots * weights_file(subject.adapters[0]).stat().st_size
    return EngineConfig(
        max_sequences=traffic.sequences,
        kv_tokens=traffic.sequences * (traffic.prompt + traffic.new + 16),
        adapter_slots=traffic.slots,
        adapter_bytes=adapters,
        host_bytes=adapters,
        max_waiting=traffic.requests,
    )


def _bounds(decoder: Decoder, config: EngineConfig) -> int:
    """Bytes that the base and an engine over it may take."""
    weights = weight_count(decoder) * decoder.dtype.itemsize
    return weights + config.kv_tokens * kv_bytes(decoder) + config.adapter_bytes + config.host_bytes
