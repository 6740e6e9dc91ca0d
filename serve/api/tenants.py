"""/v1/tenants and /v1/keys: an admin's business."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from loramill.errors import Forbidden
from loramill.registry import keys, tenants
from loramill.serve.api.gateway import Here, Who
from loramill.serve.api.wire import Body, list_of
from loramill.types import KeyRecord, TenantRecord

router = APIRouter(tags=["tenants"])


Quota = Annotated[int, Field(ge=0)] | Literal["unlimited"] | None


class NewTenant(Body):
    """What a tenant is made of."""

    name: str


class Share(Body):
    """A tenant's part of the pool; what isn't given stays as it is."""

    weight: float | None = Field(default=None, gt=0)
    max_running: Quota = None
    max_queued: Quota = None


@router.post("/v1/tenants")
def create_tenant(body: NewTenant, here: Here, who: Who) -> dict[str, Any]:
    """Makes a tenant."""
    who.check_admin()
    with here.registry.writing() as session:
        return _tenant(tenants.create(session, body.name))


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
        return _tenant(
            tenants.set_share(
                session,
                tenant,
                weight=body.weight or now.weight,
                max_running=_quota(body.max_running, now.max_running),
                max_queued=_quota(body.max_queued, now.max_queued),
            )
        )


@router.post("/v1/tenants/{tenant}/keys")
def create_key(tenant: str, here: Here, who: Who) -> dict[str, Any]:
    """Makes a key for a tenant; `key` is shown this once."""
    who.check_admin()
    with here.registry.writing() as session:
        record, secret = keys.create(session, tenant)
    return _key(record) | {"key": secret}


@router.get("/v1/tenants/{tenant}/keys")
def list_keys(tenant: str, here: Here, who: Who) -> dict[str, Any]:
    """A tenant's keys, without their secrets; a tenant may list its own."""
    if not who.admin and who.tenant != tenant:
        raise Forbidden("This key may list its own tenant's keys only.")
    with here.registry.reading() as session:
        tenants.get(session, tenant)
        return list_of(keys.list_of(session, tenant), _key)


@router.delete("/v1/keys/{key_id}")
def revoke_key(key_id: str, here: Here, who: Who) -> dict[str, Any]:
    """Makes a key worthless at once."""
    who.check_admin()
    with here.registry.writing() as session:
        return _key(keys.revoke(session, key_id)) | {"deleted": True}


def _quota(said: int | Literal["unlimited"] | None, now: int | None) -> int | None:
    if said is None:
        return now
    return None if said == "unlimited" else said


def _tenant(record: TenantRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "tenant"}


def _key(record: KeyRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "key"}
