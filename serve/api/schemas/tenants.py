"""Requests and responses about tenants, their API keys, limits and usage, and the audit log."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from loramill.client.tenant_list import MAX_TENANTS_PER_REQUEST, Bytes, CompletionDays, Quota, Rate, Tokens
from loramill.serve.api.schemas.common import ALL_FIELDS, Deleted, ListQuery, ObjectType, RequestBody
from loramill.types import AuditRecord, DeletionSummary, KeyRecord, Scope, TenantRecord, UsageRecord


def _change(name: str, unit: str = "") -> Any:
    """Returns an optional field that changes a limit, with its description in TenantRecord."""
    description = (TenantRecord.model_fields[name].description or "").removesuffix(".")
    return Field(default=None, description=f'{description}{unit}, or "unlimited". Default: unchanged.')


class NewTenantRequest(RequestBody):
    """A tenant to create."""

    name: str = Field(description="Name of the tenant.")


class FairShareRequest(RequestBody):
    """A tenant's share of the worker pool. What is not given stays as it is."""

    weight: float | None = Field(
        default=None, gt=0, description=f"{TenantRecord.model_fields['weight'].description} Default: unchanged."
    )
    max_running: Quota = _change("max_running")
    max_queued: Quota = _change("max_queued")


class LimitsRequest(RequestBody):
    """Limits of a tenant, over all gateways together. What is not given stays as it is."""

    requests_per_minute: Rate = _change("requests_per_minute")
    tokens_per_minute: Tokens = _change("tokens_per_minute")
    concurrent_requests: Rate = _change("concurrent_requests")
    stored_bytes: Bytes = _change("stored_bytes", ", in bytes")


class StorageRequest(RequestBody):
    """Whether a tenant's completions may be stored, and for how long. What is not given stays as it is."""

    store_completions: bool | None = Field(
        default=None,
        description=f"{TenantRecord.model_fields['store_completions'].description} Default: unchanged.",
    )
    completion_days: CompletionDays = Field(
        default=None,
        description='Days for which its completions are stored, or "default": the setting `completion_days`. Default: '
        "unchanged.",
    )


class TenantTerms(NewTenantRequest, FairShareRequest, LimitsRequest):
    """A tenant, with its share of the pool and its limits. What is not given has its default."""


class NewTenantsRequest(RequestBody):
    """Many tenants. All are created, or none."""

    tenants: list[TenantTerms] = Field(
        min_length=1, max_length=MAX_TENANTS_PER_REQUEST, description="The tenants, each with a different name."
    )
    exist_ok: bool = Field(
        default=False, description="Update the shares and limits of existing tenants. Without it, they are a conflict."
    )
    keys: bool = Field(default=False, description="Create an API key for each new tenant.")


class NewKeyRequest(RequestBody):
    """An API key to create."""

    scopes: list[Literal["inference", "training", "adapters", "read"]] = Field(
        default=[*Scope], min_length=1, description="What the key may be used for. Default: everything."
    )
    expires_at: float | None = Field(
        default=None, gt=0, lt=2**40, description="When the key expires, in seconds since the epoch. Default: never."
    )


def _require_iso_date(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
        raise ValueError("write a day as in 2026-01-31")  # pydantic would take seconds since the epoch too
    return value


Day = Annotated[date, BeforeValidator(_require_iso_date)]


class UsagePeriod(BaseModel):
    """The query of the usage."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tenant: str | None = Field(default=None, description="Tenant to list. Default for an admin key: all tenants.")
    first: Day | None = Field(default=None, alias="from", description="First day (UTC). Default: 30 days up to `to`.")
    last: Day | None = Field(default=None, alias="to", description="Last day (UTC). Default: today.")


class AuditQuery(ListQuery):
    """The query of the audit log."""

    tenant: str | None = Field(default=None, description="Tenant to list. Default for an admin key: all tenants.")


class Tenant(TenantRecord):
    """A tenant."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["tenant"]]


class CreatedTenant(Tenant):
    """A tenant that was created or updated together with others."""

    new: bool = Field(description="Whether the tenant was created.")
    key_id: str | None = Field(description="ID of its new API key, if one was created.")
    key: str | None = Field(description="The secret of that key. It is shown only once.")


class TenantDeleted(DeletionSummary):
    """A deleted tenant, and what was deleted with it."""

    model_config = ALL_FIELDS

    id: str = Field(description="Name of the tenant.")
    object: ObjectType[Literal["tenant"]]
    deleted: Deleted


class Key(KeyRecord):
    """An API key without its secret."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["key"]]


class CreatedKey(Key):
    """A new API key."""

    key: str = Field(description="The secret. It is shown only once.")


class RevokedKey(Key):
    """A revoked API key."""

    deleted: Deleted


class DailyUsage(UsageRecord):
    """A tenant's usage of a model on one day."""

    object: ObjectType[Literal["usage"]]


class AuditChange(AuditRecord):
    """A change made through the API."""

    model_config = ALL_FIELDS

    object: ObjectType[Literal["audit.change"]]
