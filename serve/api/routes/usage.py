"""GET /v1/usage: usage by day, tenant, and model or version."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query

from loramill.errors import InvalidRequest
from loramill.registry import tenants, usage
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.schemas.common import ListObject, list_object
from loramill.serve.api.schemas.tenants import DailyUsage, UsagePeriod
from loramill.types import UsageRecord

router = APIRouter(tags=["tenants"], responses=ERRORS)

#: Number of days that are listed by default.
_DEFAULT_DAYS = 30


@router.get("/v1/usage", summary="List usage", responses=returns(ListObject[DailyUsage]))
def list_usage(period: Annotated[UsagePeriod, Query()], gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists daily usage by tenant and model, newest first, with a delay of half a second."""
    last = period.last or datetime.now(UTC).date()
    first = period.first or last - min(timedelta(_DEFAULT_DAYS - 1), last - date.min)
    if first > last:
        raise InvalidRequest(f"'from' ({first}) must not be after 'to' ({last}).", param="from")
    tenant = caller.tenant if period.tenant is None else period.tenant
    with gateway.registry.reading() as session:
        if period.tenant is not None:
            caller.check_tenant(period.tenant)
            tenants.get(session, period.tenant)
        rows = usage.daily(session, tenant, first.isoformat(), last.isoformat())
    return list_object(rows, _usage_object)


def _usage_object(record: UsageRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "usage"}
