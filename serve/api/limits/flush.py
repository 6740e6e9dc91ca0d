"""Writes the gateway's books to the record every half second, and reads there what the other gateways have seen."""

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

#: Seconds between two pages: by what others do in this time, a limit can be overshot.
FLUSH_INTERVAL_SECONDS = 0.5

#: Seconds after which a gateway that wrote nothing is forgotten when another starts.
_FORGET_AFTER_SECONDS = 86_400.0


@asynccontextmanager
async def usage_flusher(tracker: UsageTracker, registry: Registry) -> AsyncIterator[None]:
    """Keeps the books in the record while the block runs, and writes the last page at its end."""
    await run_in_threadpool(_forget_dead_gateways, registry)
    await flush_once(tracker, registry)
    stop = asyncio.Event()

    async def keep() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_INTERVAL_SECONDS):
                    await stop.wait()
            await flush_once(tracker, registry)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        stop.set()
        await keeper


async def flush_once(tracker: UsageTracker, registry: Registry) -> None:
    """Writes what has to be written and hears of the others; what fails is logged, and done at the next turn."""
    batch = tracker.next_batch()
    try:
        tracker.update_peers(await run_in_threadpool(_write_and_read_peers, registry, tracker.gateway_id, batch))
    except Unavailable:  # already logged, and this happens twice a second
        if batch is not None:
            tracker.mark_failed()
        return
    except Exception:
        # Whatever it is: limits and usage must go on as soon as the record does.
        log.exception("the usage of the last moments couldn't be written; it is kept, and tried again")
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
            usage.record_batch(session, gateway_id, batch.number, batch.counts, batch.meters, now=batch.taken_at)
    now = time.time()
    with registry.reading() as session:
        return usage.peer_windows(session, gateway_id, minute=int(now // MINUTE_SECONDS), now=now)


def _forget_dead_gateways(registry: Registry) -> None:
    with registry.writing() as session:
        usage.delete_silent_gateways(session, time.time() - _FORGET_AFTER_SECONDS)
