"""What it takes when a request comes whose adapter isn't there."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill.serve.engine import EngineConfig
from loramill_bench.engine.load import Load
from loramill_bench.engine.subject import Subject, weights_file
from loramill_bench.measure import Result

_CONTEXT = 64
#: Steps of one look at the gaps, and after how many of them the next cold adapter comes.
_STEPS, _EVERY = 50, 10


@dataclass(frozen=True, slots=True)
class Busy:
    """An engine that decodes so many sequences by one adapter while others arrive."""

    batch: int

    @property
    def name(self) -> str:
        """The sequences."""
        return f"cold under load {self.batch}"

    def measure(self, subject: Subject, rounds: int) -> list[Result]:
        """The gaps between the sequences' tokens by the clock; looks without and with arrivals take turns."""
        looks = max(1, rounds // 4)
        config = EngineConfig(
            max_sequences=self.batch + 8,
            max_batch_tokens=max(512, self.batch * _CONTEXT),
            kv_tokens=(self.batch + 8) * (_CONTEXT + _STEPS + 16),
        )
        steady, arriving = [], []
        with subject.engine(config) as engine:
            load, fresh = Load(engine), map(str, itertools.count(1))
            self._gaps(subject, load, None)
            for _ in range(looks):
                steady.append(self._gaps(subject, load, None))
                arriving.append(self._gaps(subject, load, fresh))
        calm, stirred = _typical_p99(steady), _typical_p99(arriving)
        return [
            Result(f"{self.name}: p99 gap", stirred / calm, "of steady", 1.15),
            Result(f"{self.name}: steady p99 gap", calm * 1e3, "ms"),
            Result(f"{self.name}: median gap", _typical_median(arriving) / _typical_median(steady), "of steady"),
            Result(f"{self.name}: decode", self.batch / _typical_median(arriving), "tokens/s", better="higher"),
        ]

    def _gaps(self, subject: Subject, load: Load, arrivals: Iterator[str] | None) -> list[float]:
        """Seconds between the tokens of the sequences.

        A request for a cold adapter is one token for one: more would show what a prefill takes, and not a load.
        """
        sequences = subject.requests(["0"] * self.batch, _CONTEXT, _STEPS + 2)
        ours = {request.id for request in sequences}
        load.begin(sequences)
        times = [time.perf_counter()]
        while load.open:
            if arrivals is not None and len(times) % _EVERY == 1 and len(times) < _STEPS:
                load.submit(subject.requests([next(arrivals)], 1, 1))
            if any(output.request_id in ours for output in load.step()):
                times.append(time.perf_counter())
        return np.diff(times).tolist()


def _typical_p99(looks: list[list[float]]) -> float:
    """The median of the looks' 99th percentiles: one look that something else on the machine hit doesn't count."""
    return statistics.median(float(np.percentile(gaps, 99)) for gaps in looks)


def _typical_median(looks: list[list[float]]) -> float:
    return statistics.median(statistics.median(gaps) for gaps in looks)


@dataclass(frozen=True, slots=True)
class Idle:
    """An engine that has nothing else to do."""

    name: str = "first token"

    def measure(self, subject: Subject, rounds: int) -> list[Result]:
        """From a request of 64 tokens to its first token, by the clock: each time another adapter, or always one."""
        file = weights_file(subject.adapters[0])
        with subject.engine(EngineConfig()) as engine:
            load, fresh = Load(engine), map(str, itertools.count(1))
            variants: dict[str, Callable[[], object]] = {
                "cold": lambda: load.run(subject.requests([next(fresh)], _CONTEXT, 1)),
                "warm": lambda: load.run(subject.requests(["0"], _CONTEXT, 1)),
                "read": file.read_bytes,
            }
            spent = interleaved(variants, Effort(0, rounds), time.perf_counter)
        least = spent["warm"] + spent["read"]
        return [
            Result(f"{self.name}: cold", spent["cold"] / least, "of warm and read", 1.3),
            Result(f"{self.name}: cold, by the clock", spent["cold"] * 1e3, "ms"),
            Result(f"{self.name}: warm, by the clock", spent["warm"] * 1e3, "ms"),
            Result(f"{self.name}: read of the file", spent["read"] * 1e3, "ms"),
        ]


CASES: tuple[Busy | Idle, ...] = (Busy(8), Busy(32), Idle())


def measure(subject: Subject, case: Busy | Idle, rounds: int) -> list[Result]:
    """The case's results."""
    return case.measure(subject, rounds)
