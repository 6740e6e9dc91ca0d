"""GET /healthz, /readyz, /health and /metrics, for programs that start, stop and monitor gateways."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from typing_extensions import TypedDict

from loramill.errors import Unavailable
from loramill.registry import Registry
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.responses import ERRORS, NO_KEY, OPEN_ERRORS, returns, returns_file
from loramill.serve.api.schemas.common import response_object
from loramill.serve.metrics.multiprocess import MEDIA_TYPE, exposition

router = APIRouter(tags=["health"], responses=OPEN_ERRORS)

#: Seconds within which the backend must report that it is ready.
READY_TIMEOUT_SECONDS = 5.0


@response_object
class Health(TypedDict):
    """Health of the gateway."""

    status: Annotated[Literal["ok", "ready"], Field(description="Always the same.")]


@router.get("/healthz", summary="Check the process", responses=returns(Health), openapi_extra=NO_KEY)
async def healthz() -> dict[str, str]:
    """Succeeds if the gateway's process responds."""
    return {"status": "ok"}


@router.get("/readyz", summary="Check readiness", responses=returns(Health), openapi_extra=NO_KEY)
async def readyz(gateway: GatewayDep) -> dict[str, str]:
    """Succeeds if requests can be handled: the database and the engine respond."""
    await run_in_threadpool(_ping_database, gateway.registry)
    await _check_engine(gateway)
    return {"status": "ready"}


@router.get("/health", summary="Check the engine", responses=returns(Health), openapi_extra=NO_KEY)
async def health(gateway: GatewayDep) -> dict[str, str]:
    """Succeeds if the engine responds, as in vLLM, whose clients call this endpoint first."""
    await _check_engine(gateway)
    return {"status": "ok"}


@router.get("/metrics", summary="Read metrics", responses=ERRORS | returns_file("text/plain"), response_class=Response)
async def get_metrics(caller: CallerDep) -> Response:
    """Returns metrics for Prometheus. They name tenants, so an admin key is required."""
    caller.check_admin()
    return Response(await run_in_threadpool(exposition), media_type=MEDIA_TYPE)


async def _check_engine(gateway: Gateway) -> None:
    """Raises Unavailable unless the engine of the base responds in time."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_SECONDS):
            await gateway.served[gateway.base.name].backend.ready()
    except TimeoutError as error:
        raise Unavailable("The engine does not respond yet; retry in a moment.") from error


def _ping_database(registry: Registry) -> None:
    with registry.reading() as session:
        # A table's page: SQLite answers "SELECT 1" on an open connection even if the file is damaged.
        session.execute(text("SELECT 1 FROM tenants LIMIT 1"))
