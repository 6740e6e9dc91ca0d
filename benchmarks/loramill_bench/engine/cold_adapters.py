"""The cost of requests whose adapter is not loaded."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill.serve.engine import EngineConfig
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.engine.harness import Harness, weights_file
from loramill_bench.results import Result

_CONTEXT = 64
#: Steps of one pass, and the number of steps between two requests for cold adapters.
_PASS_STEPS, _ARRIVAL_STEPS = 50, 10


@dataclass(frozen=True, slots=True)
class ColdUnderLoad:
    """Decoding a batch with one adapter while requests for cold adapters arrive."""

    batch: int

    @property
    def name(self) -> str:
        """Name with the number of sequences."""
        return f"cold under load {self.batch}"

    def measure(self, harness: Harness, rounds: int) -> list[Result]:
        """Compares wall-clock gaps between the sequences' tokens; passes without and with arrivals alternate."""
        looks = max(1, rounds // 4)
        config = EngineConfig(
            max_sequences=self.batch + 8,
            max_batch_tokens=max(512, self.batch * _CONTEXT),
            kv_tokens=(self.batch + 8) * (_CONTEXT + _PASS_STEPS + 16),
        )
        steady, arriving = [], []
        with harness.engine(config) as engine:
            driver, fresh = EngineDriver(engine), map(str, itertools.count(1))
            self._gaps(harness, driver, None)
            for _ in range(looks):
                steady.append(self._gaps(harness, driver, None))
                arriving.append(self._gaps(harness, driver, fresh))
        calm, stirred = _median_p99(steady), _median_p99(arriving)
        return [
            Result(f"{self.name}: p99 gap", stirred / calm, "of steady", 1.15),
            Result(f"{self.name}: steady p99 gap", calm * 1e3, "ms"),
            Result(f"{self.name}: median gap", _median_gap(arriving) / _median_gap(steady), "of steady"),
            Result(f"{self.name}: decode", self.batch / _median_gap(arriving), "tokens/s", better="higher"),
        ]

    def _gaps(self, harness: Harness, driver: EngineDriver, arrivals: Iterator[str] | None) -> list[float]:
        """Returns the seconds between the tokens of the sequences.

        A request for a cold adapter has a prompt of one token and an answer of one, since a longer prompt would measure
        the prefill instead of the load.
        """
        sequences = harness.requests(["0"] * self.batch, _CONTEXT, _PASS_STEPS + 2)
        ours = {request.id for request in sequences}
        driver.run_to_first_tokens(sequences)
        times = [time.perf_counter()]
        while driver.open:
            if arrivals is not None and len(times) % _ARRIVAL_STEPS == 1 and len(times) < _PASS_STEPS:
                driver.submit(harness.requests([next(arrivals)], 1, 1))
            if any(output.request_id in ours for output in driver.step()):
                times.append(time.perf_counter())
        return np.diff(times).tolist()


def _median_p99(passes: list[list[float]]) -> float:
    """Median of the passes' 99th percentiles, which ignores a pass that another process disturbed."""
    return statistics.median(float(np.percentile(gaps, 99)) for gaps in passes)


def _median_gap(passes: list[list[float]]) -> float:
    return statistics.median(statistics.median(gaps) for gaps in passes)


@dataclass(frozen=True, slots=True)
class ColdFirstToken:
    """The time to first token of a request for a cold adapter, on an idle engine."""

    name: str = "first token"

    def measure(self, harness: Harness, rounds: int) -> list[Result]:
        """Compares the wall-clock time to first token of prompts of 64 tokens with a cold and with a warm adapter."""
        file = weights_file(harness.adapters[0])
        with harness.engine(EngineConfig()) as engine:
            driver, fresh = EngineDriver(engine), map(str, itertools.count(1))
            variants: dict[str, Callable[[], object]] = {
                "cold": lambda: driver.run(harness.requests([next(fresh)], _CONTEXT, 1)),
                "warm": lambda: driver.run(harness.requests(["0"], _CONTEXT, 1)),
                "read": file.read_bytes,
            }
            spent = interleaved(variants, Effort(0, rounds), time.perf_counter)
        least = spent["warm"] + spent["read"]
        return [
            Result(f"{self.name}: cold", spent["cold"] / least, "of warm and read", 1.3),
            Result(f"{self.name}: cold, wall clock", spent["cold"] * 1e3, "ms"),
            Result(f"{self.name}: warm, wall clock", spent["warm"] * 1e3, "ms"),
            Result(f"{self.name}: file read", spent["read"] * 1e3, "ms"),
        ]


CASES: tuple[ColdUnderLoad | ColdFirstToken, ...] = (ColdUnderLoad(8), ColdUnderLoad(32), ColdFirstToken())


def measure(harness: Harness, case: ColdUnderLoad | ColdFirstToken, rounds: int) -> list[Result]:
    """The case's results."""
    return case.measure(harness, rounds)
