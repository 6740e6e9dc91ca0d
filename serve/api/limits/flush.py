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
from loramill.serve.api.limits.policy import MINUTE
from loramill.serve.api.limits.tracker import Books, Page
from loramill.types import Meter

log = logging.getLogger("loramill.gateway")

#: Seconds between two pages: by what others do in this time, a limit can be overshot.
EVERY = 0.5

#: Seconds after which a gateway that wrote nothing is forgotten when another starts.
_FORGOTTEN = 86_400.0


@asynccontextmanager
async def keeping(books: Books, registry: Registry) -> AsyncIterator[None]:
    """Keeps the books in the record while the block runs, and writes the last page at its end."""
    await run_in_threadpool(_forget, registry)
    await turn(books, registry)
    stop = asyncio.Event()

    async def keep() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    await stop.wait()
            await turn(books, registry)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        stop.set()
        await keeper


async def turn(books: Books, registry: Registry) -> None:
    """Writes what has to be written and hears of the others; what fails is logged, and done at the next turn."""
    page = books.page()
    try:
        books.hear(await run_in_threadpool(_exchange, registry, books.gateway, page))
    except Unavailable:  # already logged, and this happens twice a second
        if page is not None:
            books.unwritten()
        return
    except Exception:
        # Whatever it is: limits and usage must go on as soon as the record does.
        log.exception("the usage of the last moments couldn't be written; it is kept, and tried again")
        if page is not None:
            books.unwritten()
        return
    if page is not None:
        books.written(page)


def _exchange(registry: Registry, gateway: str, page: Page | None) -> Mapping[str, Sequence[Meter]]:
    if page is not None:
        with registry.writing(noted=False) as session:
            usage.write(session, gateway, page.number, page.counts, page.meters, now=page.now)
    now = time.time()
    with registry.reading() as session:
        return usage.others(session, gateway, minute=int(now // MINUTE), now=now)


def _forget(registry: Registry) -> None:
    with registry.writing() as session:
        usage.forget_gateways(session, time.time() - _FORGOTTEN)
