"""Writes what the answers of versions are like to the database, for adapters with an open rollout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from starlette.concurrency import run_in_threadpool

from loramill.errors import Unavailable
from loramill.registry import Registry
from loramill.registry.rollouts import records, traffic
from loramill.registry.rollouts.traffic import TrafficKey
from loramill.serve.api.traffic.tracker import TrafficTracker
from loramill.types import TrafficCounts

log = logging.getLogger("loramill.gateway")

#: Seconds between two flushes, each of which reads the open rollouts.
FLUSH_INTERVAL_SECONDS = 2.0


@asynccontextmanager
async def traffic_flusher(tracker: TrafficTracker, registry: Registry, gateway_id: str) -> AsyncIterator[None]:
    """Flushes while the block runs, and what is left at its end."""
    stop = asyncio.Event()

    async def flush_periodically() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_INTERVAL_SECONDS):
                    await stop.wait()
            await flush_traffic(tracker, registry, gateway_id)

    flusher = asyncio.create_task(flush_periodically())
    try:
        yield
    finally:
        stop.set()
        await flusher


async def flush_traffic(tracker: TrafficTracker, registry: Registry, gateway_id: str) -> None:
    """Writes what is new. A failure is logged, and the next flush writes the same and what came since."""
    tracker.forget_old()
    try:
        needed = await run_in_threadpool(_read_needed, registry)
        if unwritten := tracker.unwritten(needed):
            await run_in_threadpool(_write, registry, gateway_id, unwritten)
            tracker.mark_written(unwritten)
    except Unavailable:
        return  # already logged, and this happens every two seconds
    except Exception:  # whatever the error is, the next flush may succeed
        log.exception("the traffic of versions could not be written; retrying")


def _read_needed(registry: Registry) -> set[tuple[str, str]]:
    with registry.reading() as session:
        return traffic.compared_versions(records.list_open(session))


def _write(registry: Registry, gateway_id: str, counts: Mapping[TrafficKey, TrafficCounts]) -> None:
    with registry.writing(invalidate_caches=False) as session:
        traffic.write(session, gateway_id, counts)
