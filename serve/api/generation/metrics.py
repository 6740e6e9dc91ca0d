"""What a gateway counts of one generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from loramill.errors import LoramillError, Overloaded, Unavailable
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.metrics import definitions as metrics
from loramill.serve.protocol import TextChunk, TextRequest

#: The code that is counted where all was answered, and where the caller went away before.
STATUS_COMPLETED, STATUS_DISCONNECTED = 200, 499

_tenant_label = metrics.BoundedLabels(metrics.MAX_TENANT_LABELS)
_adapter_label = metrics.BoundedLabels(metrics.MAX_ADAPTER_LABELS)


class GenerationMetrics:
    """One generation, in flight while the block runs; one that is refused before is told of by `ended` alone.

    Args:
        target: whom it is counted to.
        requests: its answers.
        n: answers to each prompt, which follow each other.

    Attributes:
        last: the last chunk of each answer that has begun, by its index.
    """

    def __init__(self, target: Target, requests: Sequence[TextRequest], n: int) -> None:
        self.last_chunks: dict[int, TextChunk] = {}
        self._started_at = time.perf_counter()
        self._n = n
        self._endpoint = "chat" if requests[0].messages else "completions"
        self._tenant = _tenant_label(target.tenant) if target.tenant else metrics.ADMIN_LABEL
        self._adapter = target.name if target.version is None else _adapter_label(target.name)
        who = self._tenant, self._adapter
        self._first_token = metrics.FIRST_TOKEN.labels(*who)
        self._between_tokens = metrics.BETWEEN_TOKENS.labels(self._tenant)
        self._prompt_tokens = metrics.PROMPT_TOKENS.labels(*who)
        self._completion_tokens = metrics.COMPLETION_TOKENS.labels(*who)
        self._chunk_times = [0.0] * len(requests)
        self._unfinished = len(requests)

    def __enter__(self) -> Self:
        metrics.IN_FLIGHT.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        metrics.IN_FLIGHT.dec()
        self.record_end(error)

    def record_chunk(self, index: int, chunk: TextChunk) -> None:
        """Notes a chunk; on a busy gateway that must cost some microseconds and no more."""
        now, before = time.perf_counter(), self.last_chunks.get(index)
        more = chunk.completion_tokens - (before.completion_tokens if before else 0)
        if before is None:
            self._first_token.observe(now - self._started_at)
            if index % self._n == 0:  # the first of the answers to a prompt, which follow each other
                self._prompt_tokens.inc(chunk.prompt_tokens)
        elif more:
            self._between_tokens.observe((now - self._chunk_times[index]) / more)
        self._completion_tokens.inc(more)
        self._chunk_times[index], self.last_chunks[index] = now, chunk
        self._unfinished -= chunk.finish is not None

    def record_end(self, error: BaseException | None) -> None:
        """Notes the end; an answer is whole once it has its end, even if nobody asked for what comes behind it."""
        code = STATUS_COMPLETED if error is None or not self._unfinished else _status_of(error)
        metrics.REQUESTS.labels(self._endpoint, self._tenant, self._adapter, code).inc()
        if code == STATUS_COMPLETED:
            metrics.DURATION.labels(self._tenant).observe(time.perf_counter() - self._started_at)
        if (
            isinstance(error, LoramillError)
            and not self.last_chunks
            and code in (Overloaded.status, Unavailable.status)
        ):
            metrics.REFUSED.labels(self._tenant, error.code).inc()  # there is no place for it


def _status_of(error: BaseException) -> int:
    """The status by which an end is counted; what isn't an error is that the caller has gone."""
    if isinstance(error, LoramillError):
        return error.status
    return LoramillError.status if isinstance(error, Exception) else STATUS_DISCONNECTED
