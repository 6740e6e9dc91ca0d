"""Completions of one gateway that are not in the database yet, in bounded memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from loramill.serve.metrics import definitions as metrics
from loramill.types import CompletionRecord

log = logging.getLogger("loramill.gateway")

#: Maximum size of what is not written yet, in bytes of JSON. Of answers of 4 kB, these are 8,000: about two minutes of
#: 64 requests per second while the database is unavailable.
MAX_BUFFER_BYTES = 32 << 20
#: Maximum number of completions per transaction. A hundred rows take about 10 ms on SQLite.
MAX_BATCH = 100
#: Seconds between two log lines about completions that did not fit.
_LOG_SECONDS = 10.0


class CompletionBuffer:
    """Completions in the order in which they ended; only the event loop's thread uses it.

    What does not fit is dropped and counted, since an answer never waits for the database.
    """

    def __init__(self, max_bytes: int = MAX_BUFFER_BYTES) -> None:
        self._max_bytes = max_bytes
        self._waiting: dict[str, tuple[CompletionRecord, int]] = {}
        self._bytes = 0
        self._logged_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, completion: CompletionRecord) -> bool:
        """Adds a completion; returns False if it does not fit."""
        size = len(completion.model_dump_json())
        if self._bytes + size > self._max_bytes:
            metrics.DROPPED_COMPLETIONS.inc()
            if time.monotonic() - self._logged_at >= _LOG_SECONDS:
                self._logged_at = time.monotonic()
                log.error(
                    "completions with `store: true` are not stored: %d of them, %d bytes, still wait for the database",
                    len(self._waiting),
                    self._bytes,
                )
            return False
        self._waiting[completion.id] = (completion, size)
        self._bytes += size
        return True

    def batch(self) -> Sequence[CompletionRecord]:
        """Returns the oldest completions, at most `MAX_BATCH`; they stay until they are removed."""
        return [completion for completion, _ in [*self._waiting.values()][:MAX_BATCH]]

    def remove(self, completions: Sequence[CompletionRecord]) -> None:
        """Removes completions that were written, or can't be."""
        for each in completions:
            _, size = self._waiting.pop(each.id, (None, 0))
            self._bytes -= size
