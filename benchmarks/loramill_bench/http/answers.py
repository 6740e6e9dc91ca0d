"""What came of requests, as whoever asked sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loramill.errors import EngineFault
from loramill_bench.http.work import NEW


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request; times are in seconds since it was sent.

    Attributes:
        tokens: of the answer, as the server counts them.
        times: when each chunk of it came; the first is the time to the first token.
        seconds: until the end.
        refused: by a 429 that says when to come again.
        fault: what is wrong with it; empty: nothing.
    """

    tokens: int = 0
    times: tuple[float, ...] = ()
    seconds: float = 0.0
    refused: bool = False
    fault: str = ""

    @classmethod
    def whole(cls, tokens: int, times: tuple[float, ...], seconds: float) -> Answer:
        """One that ended as it should, which is wrong of a short one."""
        fault = "" if tokens == NEW else f"{tokens} tokens instead of {NEW}"
        return cls(tokens, times, seconds, fault=fault)


@dataclass(frozen=True, slots=True)
class Run:
    """All that was asked at one go.

    Attributes:
        seconds: from the first request to the end of the last answer, by the clock.
        cpu: seconds that asking and listening took; 0 where nobody had to.
        answers: in the order in which they were asked for.
    """

    seconds: float
    cpu: float
    answers: tuple[Answer, ...]

    @property
    def served(self) -> list[Answer]:
        """Those that are as they should be."""
        return [answer for answer in self.answers if not answer.refused and not answer.fault]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the others; a refusal is nothing wrong."""
        return [answer.fault for answer in self.answers if answer.fault]


def rate(run: Run) -> float:
    """Output tokens a second."""
    return sum(answer.tokens for answer in run.served) / run.seconds


def first_token(run: Run) -> float:
    """Seconds to the first token, the median."""
    return _percentile([answer.times[0] for answer in run.served], 50)


def gap(run: Run) -> float:
    """Seconds between two chunks of an answer, the 99th percentile."""
    return _percentile([gap for answer in run.served for gap in np.diff(answer.times)], 99)


def latency(run: Run) -> float:
    """Seconds to the end of an answer, the 95th percentile."""
    return _percentile([answer.seconds for answer in run.served], 95)


def check_complete(who: str, runs: Iterable[Run]) -> None:
    """Raises EngineFault if something is wrong with an answer, or one was refused: then nothing can be compared."""
    for run in runs:
        missing = len(run.answers) - len(run.served)
        if missing:
            why = run.faults[0] if run.faults else "refused"
            raise EngineFault(f"{who} left {missing} of {len(run.answers)} requests without a proper answer: {why}.")


def _percentile(seconds: Sequence[float], which: float) -> float:
    if not seconds:
        raise EngineFault("No answer came, so nothing can be said of its times.")
    return float(np.percentile(seconds, which))
