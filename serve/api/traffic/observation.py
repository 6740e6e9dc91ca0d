"""What the answers to one call are like."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect

from loramill.errors import LoramillError, Unavailable
from loramill.serve.protocol import TextChunk
from loramill.types import TrafficCounts
from loramill.types.rollouts import latency_bucket


class CallObservation:
    """Observes a call while the block runs, and counts it at the end if it finished or its version failed.

    Calls that clients abandon, that are refused, or that are wrong, show nothing about the version.

    Args:
        add: counts the call.
        of: adapter and version that answer; None: nothing is counted.
        answers: number of answers of the call.
    """

    def __init__(
        self, add: Callable[[str, str, TrafficCounts], None], of: tuple[str, str] | None, answers: int
    ) -> None:
        self._add, self._of = add, of
        self._started_at = time.perf_counter()
        self._unfinished = answers
        self._empty = set(range(answers))
        self._cut = False

    def recording(self, also: Callable[[int, TextChunk], None]) -> Callable[[int, TextChunk], None]:
        """Returns what records a chunk here and there. It is called for every token."""
        if self._of is None:
            return also

        def record(index: int, chunk: TextChunk) -> None:
            also(index, chunk)
            self.record_chunk(index, chunk)

        return record

    def record_chunk(self, index: int, chunk: TextChunk) -> None:
        """Records a chunk of an answer."""
        if index in self._empty and not chunk.text.isspace() and chunk.text:
            self._empty.discard(index)
        if chunk.finish is not None:
            self._unfinished -= 1
            self._cut = self._cut or chunk.finish == "length"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        counts = self._counts(error)
        if self._of is not None and counts is not None:
            self._add(*self._of, counts)

    def _counts(self, error: BaseException | None) -> TrafficCounts | None:
        if not self._unfinished:
            return TrafficCounts(
                requests=1,
                empty=int(bool(self._empty)),
                cut=int(self._cut),
                total_histogram={latency_bucket(time.perf_counter() - self._started_at): 1},
            )
        return TrafficCounts(requests=1, errors=1) if _is_fault(error) else None


def _is_fault(error: BaseException | None) -> bool:
    """Whether an error shows something about the version: that replicas are away does not."""
    if isinstance(error, LoramillError):
        return error.status >= LoramillError.status and not isinstance(error, Unavailable)
    return isinstance(error, Exception) and not isinstance(error, ClientDisconnect)
