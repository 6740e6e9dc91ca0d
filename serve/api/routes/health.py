"""GET /healthz, /readyz, /health and /metrics: for programs that start, stop and monitor gateways."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from loramill.errors import Unavailable
from loramill.registry import Registry
from loramill.serve.api.dependencies import Gateway, Here, Who
from loramill.serve.metrics.multiprocess import MEDIA_TYPE, exposition

router = APIRouter(tags=["health"])

#: Seconds within which the backend has to say that it is ready.
PATIENCE = 5.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The gateway's process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(here: Here) -> dict[str, str]:
    """Requests can be answered: the record and the engine are there."""
    await run_in_threadpool(_ask, here.registry)
    await _check_engine(here)
    return {"status": "ready"}


@router.get("/health")
async def health(here: Here) -> dict[str, str]:
    """Whether the engine answers, as in vLLM; clients for vLLM call this endpoint first."""
    await _check_engine(here)
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(who: Who) -> Response:
    """What Prometheus reads, with an admin's key: it names tenants."""
    who.check_admin()
    return Response(await run_in_threadpool(exposition), media_type=MEDIA_TYPE)


async def _check_engine(here: Gateway) -> None:
    """Raises Unavailable unless the base's engine answers in time."""
    try:
        async with asyncio.timeout(PATIENCE):
            await here.served[here.base.name].backend.ready()
    except TimeoutError as error:
        raise Unavailable("The engine doesn't answer yet; try again in a moment.") from error


def _ask(registry: Registry) -> None:
    with registry.reading() as session:
        session.execute(text("SELECT 1"))
