"""/v1/tenants and /v1/keys: an admin's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy.orm import Session

from loramill.client.tenant_list import AT_ONCE, Bytes, Quota, Rate, Tokens
from loramill.errors import Conflict, InvalidRequest
from loramill.registry import api_keys as keys
from loramill.registry import tenants
from loramill.serve.api.dependencies import Here, Who
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.audit import note
from loramill.serve.api.schemas.common import Body, list_of
from loramill.types import KeyRecord, Limits, Scope, TenantRecord

router = APIRouter(tags=["tenants"])

#: Names that an error lists.
_SHOWN = 10


class NewTenant(Body):
    """What a tenant is made of."""

    name: str


class TenantTerms(NewTenant):
    """A tenant's name, and its share and limits if they are not the defaults."""

    weight: float | None = Field(default=None, gt=0)
    max_running: Quota = None
    max_queued: Quota = None
    requests_per_minute: Rate = None
    tokens_per_minute: Tokens = None
    concurrent_requests: Rate = None
    stored_bytes: Bytes = None


class NewTenants(Body):
    """Many tenants; existing ones are a conflict, or with `exist_ok` get the shares and limits that are given."""

    tenants: list[TenantTerms] = Field(min_length=1, max_length=AT_ONCE)
    exist_ok: bool = False
    keys: bool = Field(default=False, description="make an API key for each new tenant")


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
        return _tenant(made, {})


@router.post("/v1/tenants/batch")
def create_tenants(body: NewTenants, here: Here, who: Who) -> dict[str, Any]:
    """Makes many tenants, all or none; each key is shown this once."""
    who.check_admin()
    terms = {each.name: each for each in body.tenants}
    if len(terms) < len(body.tenants):
        twice = next(name for name in terms if sum(each.name == name for each in body.tenants) > 1)
        raise InvalidRequest(f"The tenant '{twice}' is named twice; name it once.", param="tenants")
    with here.registry.writing() as session:
        there = {record.name for record in tenants.list_all(session)} & terms.keys()
        if there and not body.exist_ok:
            shown = ", ".join(sorted(there)[:_SHOWN])
            more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
            raise Conflict(
                f"{'These tenants exist' if len(there) > 1 else 'This tenant exists'} already: {shown}{more}. "
                "Nothing was made; leave them out, or set 'exist_ok' (`--exist-ok`).",
                param="tenants",
            )
        made = [_made(session, who, each, new=each.name not in there, key=body.keys) for each in body.tenants]
        load = tenants.load(session)
        return list_of(made, lambda each: _tenant(each[0], load) | each[1])


def _made(
    session: Session, who: Caller, terms: TenantTerms, *, new: bool, key: bool
) -> tuple[TenantRecord, dict[str, Any]]:
    """Makes a tenant, or changes an existing one, by its terms; makes a key if it is new and `key` is true."""
    name = terms.name
    if new:
        tenants.create(session, name)
        note(session, who, "tenant.create", name, name)
    if terms.model_fields_set & Share.model_fields.keys():
        _set_share(session, who, name, terms)
    if terms.model_fields_set & NewLimits.model_fields.keys():
        _set_limits(session, who, name, terms)
    record, secret = _new_key(session, who, name, KeyTerms()) if new and key else (None, None)
    return tenants.get(session, name), {"new": new, "key_id": record and record.id, "key": secret}


@router.get("/v1/tenants")
def list_tenants(here: Here, who: Who) -> dict[str, Any]:
    """All tenants."""
    who.check_admin()
    with here.registry.reading() as session:
        load = tenants.load(session)
        return list_of(tenants.list_all(session), lambda record: _tenant(record, load))


@router.get("/v1/tenants/{tenant}")
def retrieve_tenant(tenant: str, here: Here, who: Who) -> dict[str, Any]:
    """A tenant with its share of the pool."""
    who.check_admin()
    with here.registry.reading() as session:
        return _tenant(tenants.get(session, tenant), tenants.load(session))


@router.post("/v1/tenants/{tenant}/share")
def set_share(tenant: str, body: Share, here: Here, who: Who) -> dict[str, Any]:
    """Sets a tenant's share of the pool, relative to the other tenants', and its quotas."""
    who.check_admin()
    with here.registry.writing() as session:
        changed = _set_share(session, who, tenant, body)
        return _tenant(changed, tenants.load(session))


@router.post("/v1/tenants/{tenant}/limits")
def set_limits(tenant: str, body: NewLimits, here: Here, who: Who) -> dict[str, Any]:
    """Sets what a tenant may use of the gateways; all of them keep to it within a second."""
    who.check_admin()
    with here.registry.writing() as session:
        changed = _set_limits(session, who, tenant, body)
        return _tenant(changed, tenants.load(session))


@router.post("/v1/tenants/{tenant}/keys")
def create_key(tenant: str, here: Here, who: Who, body: KeyTerms | None = None) -> dict[str, Any]:
    """Makes a key for a tenant; `key` is shown this once."""
    who.check_admin()
    asked = body or KeyTerms()
    with here.registry.writing() as session:
        record, secret = _new_key(session, who, tenant, asked)
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


def _set_share(session: Session, who: Caller, tenant: str, body: Share | TenantTerms) -> TenantRecord:
    now = tenants.get(session, tenant)
    share: dict[str, Any] = {
        "weight": body.weight or now.weight,
        "max_running": _quota(body.max_running, now.max_running),
        "max_queued": _quota(body.max_queued, now.max_queued),
    }
    changed = tenants.set_share(session, tenant, **share)
    note(session, who, "tenant.share", tenant, tenant, **share)
    return changed


def _set_limits(session: Session, who: Caller, tenant: str, body: NewLimits | TenantTerms) -> TenantRecord:
    now = tenants.get(session, tenant)
    limits = {name: _quota(getattr(body, name), getattr(now, name)) for name in Limits.model_fields}
    changed = tenants.set_limits(session, tenant, Limits(**limits))
    note(session, who, "tenant.limits", tenant, tenant, **limits)
    return changed


def _new_key(session: Session, who: Caller, tenant: str, terms: KeyTerms) -> tuple[KeyRecord, str]:
    record, secret = keys.create(session, tenant, scopes=map(Scope, terms.scopes), expires_at=terms.expires_at)
    note(session, who, "key.create", record.id, tenant, scopes=record.scopes, expires_at=record.expires_at)
    return record, secret


def _quota(said: int | Literal["unlimited"] | None, now: int | None) -> int | None:
    if said is None:
        return now
    return None if said == "unlimited" else said


def _tenant(record: TenantRecord, load: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A tenant on the wire, with how many of its jobs run and wait."""
    running, waiting = load.get(record.name, (0, 0))
    return record.model_dump() | {"object": "tenant", "running": running, "waiting": waiting}


def _key(record: KeyRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "key"}
