"""Writes a gateway's usage to the database every half second, and reads the rate windows of the other gateways."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from starlette.concurrency import run_in_threadpool

from loramill.errors import Unavailable
from loramill.registry import Registry, usage
from loramill.serve.api.limits.policy import MINUTE_SECONDS
from loramill.serve.api.limits.tracker import UsageBatch, UsageTracker
from loramill.types import RateWindow

log = logging.getLogger("loramill.gateway")

#: Seconds between two flushes. Limits can be exceeded by what other gateways admit in this time.
FLUSH_INTERVAL_SECONDS = 0.5

#: Seconds without a flush after which a gateway counts as dead, and is deleted when another starts.
_FORGET_AFTER_SECONDS = 86_400.0


@asynccontextmanager
async def usage_flusher(tracker: UsageTracker, registry: Registry) -> AsyncIterator[None]:
    """Flushes usage while the block runs, and all that is left at its end."""
    await run_in_threadpool(_forget_dead_gateways, registry)
    await flush_once(tracker, registry)
    stop = asyncio.Event()

    async def flush_periodically() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_INTERVAL_SECONDS):
                    await stop.wait()
            await flush_once(tracker, registry)

    flusher = asyncio.create_task(flush_periodically())
    try:
        yield
    finally:
        stop.set()
        await flusher
        # If the flush before had failed, the last one repeated its batch, and later counts are not written yet.
        if tracker.has_new_counts:
            await flush_once(tracker, registry)


async def flush_once(tracker: UsageTracker, registry: Registry) -> None:
    """Writes what is new and reads the other gateways' windows. A failure is logged, and the next flush retries."""
    batch = tracker.next_batch()
    try:
        tracker.update_peers(await run_in_threadpool(_write_and_read_peers, registry, tracker.gateway_id, batch))
    except Unavailable:  # already logged, and this happens twice a second
        if batch is not None:
            tracker.mark_failed()
        return
    except Exception:
        # Whatever the error is, limits and usage must continue as soon as the database is available.
        log.exception("recent usage could not be written; retrying")
        if batch is not None:
            tracker.mark_failed()
        return
    if batch is not None:
        tracker.mark_flushed(batch)


def _write_and_read_peers(
    registry: Registry, gateway_id: str, batch: UsageBatch | None
) -> Mapping[str, Sequence[RateWindow]]:
    if batch is not None:
        with registry.writing(invalidate_caches=False) as session:
            usage.record_batch(session, gateway_id, batch.number, batch.counts, batch.windows, now=batch.taken_at)
    now = time.time()
    with registry.reading() as session:
        return usage.peer_windows(session, gateway_id, minute=int(now // MINUTE_SECONDS), now=now)


def _forget_dead_gateways(registry: Registry) -> None:
    with registry.writing() as session:
        usage.delete_silent_gateways(session, time.time() - _FORGET_AFTER_SECONDS)
