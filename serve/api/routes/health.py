"""GET /healthz, /readyz, /health and /metrics: for programs that start, stop and monitor gateways."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from loramill.errors import Unavailable
from loramill.registry import Registry
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.metrics.multiprocess import MEDIA_TYPE, exposition

router = APIRouter(tags=["health"])

#: Seconds within which the backend has to say that it is ready.
READY_TIMEOUT_SECONDS = 5.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The gateway's process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(gateway: GatewayDep) -> dict[str, str]:
    """Requests can be answered: the record and the engine are there."""
    await run_in_threadpool(_ping_database, gateway.registry)
    await _check_engine(gateway)
    return {"status": "ready"}


@router.get("/health")
async def health(gateway: GatewayDep) -> dict[str, str]:
    """Whether the engine answers, as in vLLM; clients for vLLM call this endpoint first."""
    await _check_engine(gateway)
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(caller: CallerDep) -> Response:
    """What Prometheus reads, with an admin's key: it names tenants."""
    caller.check_admin()
    return Response(await run_in_threadpool(exposition), media_type=MEDIA_TYPE)


async def _check_engine(gateway: Gateway) -> None:
    """Raises Unavailable unless the base's engine answers in time."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_SECONDS):
            await gateway.served[gateway.base.name].backend.ready()
    except TimeoutError as error:
        raise Unavailable("The engine doesn't answer yet; try again in a moment.") from error


def _ping_database(registry: Registry) -> None:
    with registry.reading() as session:
        session.execute(text("SELECT 1"))
