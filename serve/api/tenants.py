"""/v1/tenants and /v1/keys: an admin's business."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from loramill.registry import keys, tenants
from loramill.serve.api.audit import note
from loramill.serve.api.gateway import Here, Who
from loramill.serve.api.wire import Body, list_of
from loramill.types import KeyRecord, Limits, Scope, TenantRecord

router = APIRouter(tags=["tenants"])


Quota = Annotated[int, Field(ge=0, lt=2**31)] | Literal["unlimited"] | None
Rate = Annotated[int, Field(ge=1, lt=2**31)] | Literal["unlimited"] | None
Tokens = Annotated[int, Field(ge=1, lt=2**53)] | Literal["unlimited"] | None
Bytes = Annotated[int, Field(ge=0, lt=2**53)] | Literal["unlimited"] | None


class NewTenant(Body):
    """What a tenant is made of."""

    name: str


class Share(Body):
    """A tenant's part of the pool; what isn't given stays as it is."""

    weight: float | None = Field(default=None, gt=0)
    max_running: Quota = None
    max_queued: Quota = None


class NewLimits(Body):
    """What a tenant may use of the gateways; what isn't given stays as it is."""

    requests_per_minute: Rate = None
    tokens_per_minute: Tokens = None
    concurrent_requests: Rate = None
    stored_bytes: Bytes = None


class KeyTerms(Body):
    """What a tenant's key may be used for, and until when (seconds since the epoch)."""

    scopes: list[Literal["inference", "training", "adapters", "read"]] = Field(default=[*Scope], min_length=1)
    expires_at: float | None = Field(default=None, gt=0, lt=2**40)


@router.post("/v1/tenants")
def create_tenant(body: NewTenant, here: Here, who: Who) -> dict[str, Any]:
    """Makes a tenant."""
    who.check_admin()
    with here.registry.writing() as session:
        made = tenants.create(session, body.name)
        note(session, who, "tenant.create", made.name, made.name)
        return _tenant(made)


@router.get("/v1/tenants")
def list_tenants(here: Here, who: Who) -> dict[str, Any]:
    """All tenants."""
    who.check_admin()
    with here.registry.reading() as session:
        return list_of(tenants.list_all(session), _tenant)


@router.get("/v1/tenants/{tenant}")
def retrieve_tenant(tenant: str, here: Here, who: Who) -> dict[str, Any]:
    """A tenant with its share of the pool."""
    who.check_admin()
    with here.registry.reading() as session:
        return _tenant(tenants.get(session, tenant))


@router.post("/v1/tenants/{tenant}/share")
def set_share(tenant: str, body: Share, here: Here, who: Who) -> dict[str, Any]:
    """Sets a tenant's share of the pool, relative to the other tenants', and its quotas."""
    who.check_admin()
    with here.registry.writing() as session:
        now = tenants.get(session, tenant)
        share: dict[str, Any] = {
            "weight": body.weight or now.weight,
            "max_running": _quota(body.max_running, now.max_running),
            "max_queued": _quota(body.max_queued, now.max_queued),
        }
        changed = tenants.set_share(session, tenant, **share)
        note(session, who, "tenant.share", tenant, tenant, **share)
        return _tenant(changed)


@router.post("/v1/tenants/{tenant}/limits")
def set_limits(tenant: str, body: NewLimits, here: Here, who: Who) -> dict[str, Any]:
    """Sets what a tenant may use of the gateways; all of them keep to it within a second."""
    who.check_admin()
    with here.registry.writing() as session:
        now = tenants.get(session, tenant)
        limits = {name: _quota(getattr(body, name), getattr(now, name)) for name in Limits.model_fields}
        changed = tenants.set_limits(session, tenant, Limits(**limits))
        note(session, who, "tenant.limits", tenant, tenant, **limits)
        return _tenant(changed)


@router.post("/v1/tenants/{tenant}/keys")
def create_key(tenant: str, here: Here, who: Who, body: KeyTerms | None = None) -> dict[str, Any]:
    """Makes a key for a tenant; `key` is shown this once."""
    who.check_admin()
    asked = body or KeyTerms()
    with here.registry.writing() as session:
        record, secret = keys.create(session, tenant, scopes=map(Scope, asked.scopes), expires_at=asked.expires_at)
        note(session, who, "key.create", record.id, tenant, scopes=record.scopes, expires_at=record.expires_at)
    return _key(record) | {"key": secret}


@router.get("/v1/tenants/{tenant}/keys")
def list_keys(tenant: str, here: Here, who: Who) -> dict[str, Any]:
    """A tenant's keys, without their secrets; a tenant may list its own."""
    who.check_tenant(tenant)
    with here.registry.reading() as session:
        tenants.get(session, tenant)
        return list_of(keys.list_of(session, tenant), _key)


@router.delete("/v1/keys/{key_id}")
def revoke_key(key_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Makes a key worthless at once."""
    who.check_admin()
    with here.registry.writing() as session:
        revoked = keys.revoke(session, key_id)
        note(session, who, "key.revoke", key_id, revoked.tenant)
    return _key(revoked) | {"deleted": True}


def _quota(said: int | Literal["unlimited"] | None, now: int | None) -> int | None:
    if said is None:
        return now
    return None if said == "unlimited" else said


def _tenant(record: TenantRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "tenant"}


def _key(record: KeyRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "key"}
