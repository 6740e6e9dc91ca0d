"""Writes completions from the buffer to the database, in the background.

A kill -9 of the gateway loses what it has not written, at most half a second of completions while the database
responds. The texts of completions never reach the log: of errors, only the class is logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from starlette.concurrency import run_in_threadpool

from loramill.errors import LoramillError
from loramill.registry import Registry
from loramill.registry.feedback import completions
from loramill.serve.api.storage.buffer import CompletionBuffer
from loramill.serve.metrics import definitions as metrics
from loramill.types import CompletionRecord

log = logging.getLogger("loramill.gateway")

#: Seconds between two writes, as for usage.
WRITE_INTERVAL_SECONDS = 0.5


class CompletionWriter:
    """Writes the completions of one gateway.

    Attributes:
        buffer: what is not written yet.
    """

    def __init__(self, registry: Registry) -> None:
        self.buffer = CompletionBuffer()
        self._registry = registry
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Writes while the block runs, and what is left at its end."""
        stop = asyncio.Event()

        async def write_periodically() -> None:
            while not stop.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_INTERVAL_SECONDS):
                        await stop.wait()
                await self.flush()

        task = asyncio.create_task(write_periodically())
        try:
            yield
        finally:
            stop.set()
            await task
            await self.flush()

    async def flush(self) -> None:
        """Writes what is in the buffer now, so that it can be listed; after a failure, the next flush repeats it."""
        async with self._lock:
            remaining = len(self.buffer)
            while remaining > 0 and (batch := self.buffer.batch()):
                if not await self._write(batch):
                    return
                self.buffer.remove(batch)
                remaining -= len(batch)

    async def _write(self, batch: Sequence[CompletionRecord]) -> bool:
        """Writes a batch; returns False if it has to be repeated."""
        try:
            await run_in_threadpool(_add, self._registry, batch)
        except LoramillError:  # an outage, which is logged where it is translated
            return False
        except Exception as error:  # noqa: BLE001 - its text may be a prompt
            # One completion that can't be written must not hold back the others for ever.
            log.error("a batch of %d completions can't be stored (%s)", len(batch), type(error).__name__)
            return await self._write_separately(batch)
        return True

    async def _write_separately(self, batch: Sequence[CompletionRecord]) -> bool:
        for each in batch:
            try:
                await run_in_threadpool(_add, self._registry, [each])
            except LoramillError:
                return False  # those that are written already are skipped the next time
            except Exception as error:  # noqa: BLE001 - its text may be a prompt
                metrics.DROPPED_COMPLETIONS.inc()
                log.error("completion %s can't be stored (%s)", each.id, type(error).__name__)
        return True


def _add(registry: Registry, batch: Sequence[CompletionRecord]) -> None:
    with registry.writing(invalidate_caches=False) as session:
        completions.add_many(session, batch)
