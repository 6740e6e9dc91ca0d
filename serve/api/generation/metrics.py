"""Metrics of generations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect

from loramill.errors import LoramillError, Overloaded, Unavailable
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.metrics import definitions as metrics
from loramill.serve.protocol import TextChunk, TextRequest

#: Statuses that are counted for a complete response, and for a client that disconnected before the end.
STATUS_COMPLETED, STATUS_DISCONNECTED = 200, 499

_tenant_label = metrics.BoundedLabels(metrics.MAX_TENANT_LABELS)
_adapter_label = metrics.BoundedLabels(metrics.MAX_ADAPTER_LABELS)


class GenerationMetrics:
    """Counts one call, which is in flight while the block runs. For a rejected call, `record_end` is enough.

    Args:
        target: the model and the tenant that the call is counted for.
        requests: one request per answer.
        n: answers per prompt; those to the same prompt are adjacent.

    Attributes:
        last_chunks: the last chunk of each answer that has begun, by the answer's index.
    """

    def __init__(self, target: Target, requests: Sequence[TextRequest], n: int) -> None:
        self.last_chunks: dict[int, TextChunk] = {}
        self._started_at = time.perf_counter()
        self._n = n
        self._endpoint = "chat" if requests[0].messages else "completions"
        self._tenant = _tenant_label(target.tenant) if target.tenant else metrics.ADMIN_LABEL
        self._adapter = target.name if target.version is None else _adapter_label(target.name)
        labels = self._tenant, self._adapter
        self._first_token = metrics.FIRST_TOKEN.labels(*labels)
        self._between_tokens = metrics.BETWEEN_TOKENS.labels(self._tenant)
        self._prompt_tokens = metrics.PROMPT_TOKENS.labels(*labels)
        self._completion_tokens = metrics.COMPLETION_TOKENS.labels(*labels)
        self._chunk_times = [0.0] * len(requests)
        self._unfinished = len(requests)

    def __enter__(self) -> Self:
        metrics.IN_FLIGHT.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        metrics.IN_FLIGHT.dec()
        self.record_end(error)

    def record_chunk(self, index: int, chunk: TextChunk) -> None:
        """Records a chunk. It is called for every token, so it must take no more than a few microseconds."""
        now, previous = time.perf_counter(), self.last_chunks.get(index)
        new_tokens = chunk.completion_tokens - (previous.completion_tokens if previous else 0)
        if previous is None:
            self._first_token.observe(now - self._started_at)
            if index % self._n == 0:  # the first answer to a prompt
                self._prompt_tokens.inc(chunk.prompt_tokens)
        elif new_tokens:
            self._between_tokens.observe((now - self._chunk_times[index]) / new_tokens)
        self._completion_tokens.inc(new_tokens)
        self._chunk_times[index], self.last_chunks[index] = now, chunk
        self._unfinished -= chunk.finish is not None

    def record_end(self, error: BaseException | None) -> None:
        """Records the end. Once all answers are finished, an error no longer counts."""
        status = _status_of(error) if self._unfinished else STATUS_COMPLETED
        metrics.REQUESTS.labels(self._endpoint, self._tenant, self._adapter, status).inc()
        if status == STATUS_COMPLETED:
            metrics.DURATION.labels(self._tenant).observe(time.perf_counter() - self._started_at)
        rejected = not self.last_chunks and status in (Overloaded.status, Unavailable.status)
        if isinstance(error, LoramillError) and rejected:
            metrics.REFUSED.labels(self._tenant, error.code).inc()


def _status_of(error: BaseException | None) -> int:
    """The status of a call that did not finish. Without an error, or with a cancellation, the client disconnected."""
    if isinstance(error, LoramillError):
        return error.status
    failed = isinstance(error, Exception) and not isinstance(error, ClientDisconnect)
    return LoramillError.status if failed else STATUS_DISCONNECTED
