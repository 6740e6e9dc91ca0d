"""Answers as the client sees them, and the figures of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loramill.errors import EngineFault
from loramill_bench.http.workload import OUTPUT_TOKENS


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request. Times are seconds since the request was sent.

    Attributes:
        tokens: Number of output tokens, as counted by the server.
        times: Arrival time of each chunk; the first is the time to first token.
        seconds: Time until the end of the answer.
        refused: Whether it is a 429 with Retry-After.
        fault: What is wrong with the answer; empty if nothing is.
    """

    tokens: int = 0
    times: tuple[float, ...] = ()
    seconds: float = 0.0
    refused: bool = False
    fault: str = ""

    @classmethod
    def completed(cls, tokens: int, times: tuple[float, ...], seconds: float) -> Answer:
        """An answer that ended normally; it has a fault if it has too few tokens."""
        fault = "" if tokens == OUTPUT_TOKENS else f"{tokens} tokens instead of {OUTPUT_TOKENS}"
        return cls(tokens, times, seconds, fault=fault)


@dataclass(frozen=True, slots=True)
class Run:
    """The answers to all requests of one run.

    Attributes:
        seconds: Wall-clock time from the first request to the end of the last answer.
        cpu: CPU seconds of the HTTP client; 0 without one.
        answers: The answers, in the order of their requests.
    """

    seconds: float
    cpu: float
    answers: tuple[Answer, ...]

    @property
    def served(self) -> list[Answer]:
        """The answers that are complete and without faults."""
        return [answer for answer in self.answers if not answer.refused and not answer.fault]

    @property
    def faults(self) -> list[str]:
        """The faults of the answers; a refusal is not a fault."""
        return [answer.fault for answer in self.answers if answer.fault]


def output_rate(run: Run) -> float:
    """Output tokens per second."""
    return sum(answer.tokens for answer in run.served) / run.seconds


def median_first_token(run: Run) -> float:
    """Median time to first token, in seconds."""
    return _percentile([answer.times[0] for answer in run.served], 50)


def p99_gap(run: Run) -> float:
    """99th percentile of the time between two chunks of an answer, in seconds."""
    return _percentile([gap for answer in run.served for gap in np.diff(answer.times)], 99)


def p95_latency(run: Run) -> float:
    """95th percentile of the time to the end of an answer, in seconds."""
    return _percentile([answer.seconds for answer in run.served], 95)


def check_complete(server: str, runs: Iterable[Run]) -> None:
    """Raises EngineFault if any answer was refused or has a fault, since the run can't be compared then."""
    for run in runs:
        missing = len(run.answers) - len(run.served)
        if missing:
            why = run.faults[0] if run.faults else "refused"
            raise EngineFault(f"{server} left {missing} of {len(run.answers)} requests without a proper answer: {why}.")


def _percentile(seconds: Sequence[float], percentile: float) -> float:
    if not seconds:
        raise EngineFault("No answer was completed, so there is nothing to measure.")
    return float(np.percentile(seconds, percentile))
