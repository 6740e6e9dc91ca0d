"""GET /v1/usage: what was asked, by day, tenant, and model or version."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from loramill.errors import InvalidRequest
from loramill.registry import tenants, usage
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.schemas.common import list_object
from loramill.types import UsageRecord

router = APIRouter(tags=["tenants"])

#: Days that are shown if the query doesn't say.
_DEFAULT_DAYS = 30


def _require_iso_date(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
        raise ValueError("write a day as in 2026-01-31")  # pydantic would take seconds since the epoch too
    return value


Day = Annotated[date, BeforeValidator(_require_iso_date)]


class UsagePeriod(BaseModel):
    """The query: a tenant, and the first and the last day (UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tenant: str | None = None
    first: Day | None = Field(default=None, alias="from")
    last: Day | None = Field(default=None, alias="to")


@router.get("/v1/usage")
def list_usage(period: Annotated[UsagePeriod, Query()], gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """The caller's tenant's usage, the newest day first; an admin sees all, or a tenant's. Half a second behind."""
    last = period.last or datetime.now(UTC).date()
    first = period.first or last - min(timedelta(_DEFAULT_DAYS - 1), last - date.min)
    if first > last:
        raise InvalidRequest(f"The days from {first} to {last} are none; 'from' comes first.", param="from")
    tenant = caller.tenant if period.tenant is None else period.tenant
    with gateway.registry.reading() as session:
        if period.tenant is not None:
            caller.check_tenant(period.tenant)
            tenants.get(session, period.tenant)
        rows = usage.daily(session, tenant, first.isoformat(), last.isoformat())
    return list_object(rows, _usage_object)


def _usage_object(record: UsageRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "usage"}
