"""/v1/tenants and /v1/keys: tenants, their shares, limits and API keys. Changes need an admin key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter
from sqlalchemy.orm import Session

from loramill.errors import Conflict, InvalidRequest
from loramill.registry import api_keys as keys
from loramill.registry import tenants
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import KeyIdPath, ListObject, TenantPath, list_object
from loramill.serve.api.schemas.tenants import (
    CreatedKey,
    CreatedTenant,
    FairShareRequest,
    Key,
    LimitsRequest,
    NewKeyRequest,
    NewTenantRequest,
    NewTenantsRequest,
    RevokedKey,
    StorageRequest,
    Tenant,
    TenantTerms,
)
from loramill.types import CompletionStorage, KeyRecord, Limits, Scope, TenantRecord

router = APIRouter(tags=["tenants"], responses=ERRORS)

#: Number of names that an error lists.
_MAX_NAMES_SHOWN = 10


@router.post("/v1/tenants", summary="Create a tenant", responses=returns(Tenant))
def create_tenant(body: NewTenantRequest, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Creates a tenant."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        made = tenants.create(session, body.name)
        record_change(session, caller, "tenant.create", made.name, made.name)
        return _tenant_object(made, {})


@router.post("/v1/tenants/batch", summary="Create many tenants", responses=returns(ListObject[CreatedTenant]))
def create_tenants(body: NewTenantsRequest, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Creates many tenants, all or none. Secrets of new keys are shown only once."""
    caller.check_admin()
    terms = {each.name: each for each in body.tenants}
    if len(terms) < len(body.tenants):
        twice = next(name for name in terms if sum(each.name == name for each in body.tenants) > 1)
        raise InvalidRequest(f"The tenant '{twice}' is listed twice; list it once.", param="tenants")
    with gateway.registry.writing() as session:
        existing = {record.name for record in tenants.list_tenants(session)} & terms.keys()
        if existing and not body.exist_ok:
            shown = ", ".join(sorted(existing)[:_MAX_NAMES_SHOWN])
            more = f" and {len(existing) - _MAX_NAMES_SHOWN} more" if len(existing) > _MAX_NAMES_SHOWN else ""
            raise Conflict(
                f"{'These tenants exist' if len(existing) > 1 else 'This tenant exists'} already: {shown}{more}. "
                "No tenant was created; omit them, or set 'exist_ok' (`--exist-ok`).",
                param="tenants",
            )
        made = [
            _create_or_update(session, caller, each, new=each.name not in existing, key=body.keys)
            for each in body.tenants
        ]
        load = tenants.job_counts(session)
        return list_object(made, lambda each: _tenant_object(each[0], load) | each[1])


def _create_or_update(
    session: Session, caller: Caller, terms: TenantTerms, *, new: bool, key: bool
) -> tuple[TenantRecord, dict[str, Any]]:
    """Creates or updates a tenant. Creates a key if the tenant is new and `key` is true."""
    name = terms.name
    if new:
        tenants.create(session, name)
        record_change(session, caller, "tenant.create", name, name)
    if terms.model_fields_set & FairShareRequest.model_fields.keys():
        _set_share(session, caller, name, terms)
    if terms.model_fields_set & LimitsRequest.model_fields.keys():
        _set_limits(session, caller, name, terms)
    record, secret = _new_key(session, caller, name, NewKeyRequest()) if new and key else (None, None)
    return tenants.get(session, name), {"new": new, "key_id": record and record.id, "key": secret}


@router.get("/v1/tenants", summary="List tenants", responses=returns(ListObject[Tenant]))
def list_tenants(gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists all tenants."""
    caller.check_admin()
    with gateway.registry.reading() as session:
        load = tenants.job_counts(session)
        return list_object(tenants.list_tenants(session), lambda record: _tenant_object(record, load))


@router.get("/v1/tenants/{tenant}", summary="Retrieve a tenant", responses=returns(Tenant))
def retrieve_tenant(tenant: TenantPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Returns a tenant with its share of the pool and its limits."""
    caller.check_admin()
    with gateway.registry.reading() as session:
        return _tenant_object(tenants.get(session, tenant), tenants.job_counts(session))


@router.post("/v1/tenants/{tenant}/share", summary="Set a tenant's share", responses=returns(Tenant))
def set_share(tenant: TenantPath, body: FairShareRequest, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Sets a tenant's share of the worker pool and its job quotas."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        changed = _set_share(session, caller, tenant, body)
        return _tenant_object(changed, tenants.job_counts(session))


@router.post("/v1/tenants/{tenant}/limits", summary="Set a tenant's limits", responses=returns(Tenant))
def set_limits(tenant: TenantPath, body: LimitsRequest, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Sets a tenant's limits. All gateways apply them within a second."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        changed = _set_limits(session, caller, tenant, body)
        return _tenant_object(changed, tenants.job_counts(session))


@router.post("/v1/tenants/{tenant}/storage", summary="Set a tenant's storage", responses=returns(Tenant))
def set_storage(tenant: TenantPath, body: StorageRequest, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Records whether a tenant consents to storing completions, and for how long; applied within a second.

    Without consent, no further completion is stored, and nightly runs use no feedback. What is stored already stays
    until its retention ends or it is deleted.
    """
    caller.check_admin()
    with gateway.registry.writing() as session:
        now = tenants.get(session, tenant)
        storage = CompletionStorage(
            store_completions=now.store_completions if body.store_completions is None else body.store_completions,
            completion_days=_resolve_days(body.completion_days, now.completion_days),
        )
        changed = tenants.set_storage(session, tenant, storage)
        record_change(session, caller, "tenant.storage", tenant, tenant, **storage.model_dump())
        return _tenant_object(changed, tenants.job_counts(session))


@router.post("/v1/tenants/{tenant}/keys", summary="Create an API key", responses=returns(CreatedKey))
def create_key(
    tenant: TenantPath, gateway: GatewayDep, caller: CallerDep, body: NewKeyRequest | None = None
) -> dict[str, Any]:
    """Creates an API key for a tenant. The secret, `key`, is shown only once."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        record, secret = _new_key(session, caller, tenant, body or NewKeyRequest())
    return _key_object(record) | {"key": secret}


@router.get("/v1/tenants/{tenant}/keys", summary="List API keys", responses=returns(ListObject[Key]))
def list_keys(tenant: TenantPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists a tenant's API keys without their secrets. A tenant may list its own."""
    caller.check_tenant(tenant)
    with gateway.registry.reading() as session:
        tenants.get(session, tenant)
        return list_object(keys.list_keys(session, tenant), _key_object)


@router.delete("/v1/keys/{key_id}", summary="Revoke an API key", responses=returns(RevokedKey))
def revoke_key(key_id: KeyIdPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Revokes an API key immediately."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        revoked = keys.revoke(session, key_id)
        record_change(session, caller, "key.revoke", key_id, revoked.tenant)
    return _key_object(revoked) | {"deleted": True}


def _set_share(session: Session, caller: Caller, tenant: str, body: FairShareRequest) -> TenantRecord:
    now = tenants.get(session, tenant)
    share: dict[str, Any] = {
        "weight": body.weight or now.weight,
        "max_running": _resolve_quota(body.max_running, now.max_running),
        "max_queued": _resolve_quota(body.max_queued, now.max_queued),
    }
    changed = tenants.set_fair_share(session, tenant, **share)
    record_change(session, caller, "tenant.share", tenant, tenant, **share)
    return changed


def _set_limits(session: Session, caller: Caller, tenant: str, body: LimitsRequest) -> TenantRecord:
    now = tenants.get(session, tenant)
    limits = {name: _resolve_quota(getattr(body, name), getattr(now, name)) for name in Limits.model_fields}
    changed = tenants.set_limits(session, tenant, Limits(**limits))
    record_change(session, caller, "tenant.limits", tenant, tenant, **limits)
    return changed


def _new_key(session: Session, caller: Caller, tenant: str, terms: NewKeyRequest) -> tuple[KeyRecord, str]:
    record, secret = keys.create(session, tenant, scopes=map(Scope, terms.scopes), expires_at=terms.expires_at)
    record_change(session, caller, "key.create", record.id, tenant, scopes=record.scopes, expires_at=record.expires_at)
    return record, secret


def _resolve_quota(requested: int | Literal["unlimited"] | None, current: int | None) -> int | None:
    if requested is None:
        return current
    return None if requested == "unlimited" else requested


def _resolve_days(requested: float | Literal["default"] | None, current: float | None) -> float | None:
    if requested is None:
        return current
    return None if requested == "default" else requested


def _tenant_object(record: TenantRecord, load: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Returns a tenant with its numbers of running and waiting jobs."""
    running, waiting = load.get(record.name, (0, 0))
    return record.model_dump() | {"object": "tenant", "running": running, "waiting": waiting}


def _key_object(record: KeyRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "key"}
