"""GET /v1/usage: what was asked, by day, tenant, and model or version."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from loramill.errors import InvalidRequest
from loramill.registry import tenants, usage
from loramill.serve.api.dependencies import Here, Who
from loramill.serve.api.schemas.common import list_of
from loramill.types import UsageRecord

router = APIRouter(tags=["tenants"])

#: Days that are shown if the query doesn't say.
_DAYS = 30


def _written_out(said: object) -> object:
    if isinstance(said, str) and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", said, re.ASCII):
        raise ValueError("write a day as in 2026-01-31")  # pydantic would take seconds since the epoch too
    return said


Day = Annotated[date, BeforeValidator(_written_out)]


class Span(BaseModel):
    """The query: a tenant, and the first and the last day (UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tenant: str | None = None
    first: Day | None = Field(default=None, alias="from")
    last: Day | None = Field(default=None, alias="to")


@router.get("/v1/usage")
def list_usage(span: Annotated[Span, Query()], here: Here, who: Who) -> dict[str, Any]:
    """The caller's tenant's usage, the newest day first; an admin sees all, or a tenant's. Half a second behind."""
    last = span.last or datetime.now(UTC).date()
    first = span.first or last - min(timedelta(_DAYS - 1), last - date.min)
    if first > last:
        raise InvalidRequest(f"The days from {first} to {last} are none; 'from' comes first.", param="from")
    tenant = who.tenant if span.tenant is None else span.tenant
    with here.registry.reading() as session:
        if span.tenant is not None:
            who.check_tenant(span.tenant)
            tenants.get(session, span.tenant)
        rows = usage.daily(session, tenant, first.isoformat(), last.isoformat())
    return list_of(rows, _row)


def _row(record: UsageRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "usage"}
