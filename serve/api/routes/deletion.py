"""Deletes adapters, versions, models and tenants, and renames adapters.

The answer is sent after the commit: this gateway then refuses the name, and every other one within half a second.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, ModelNotFound
from loramill.names import AdapterName, ModelName
from loramill.registry import adapters, deletion, renaming
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.routes.adapters import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import RequestBody
from loramill.types import DeletionSummary

router = APIRouter()


class RenameRequest(RequestBody):
    """An adapter's new name, `tenant/adapter`, of the same tenant."""

    to: str


class DeletionQuery(BaseModel):
    """The query of a deletion that may affect jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cancel_jobs: bool = Field(
        default=False, description="cancel jobs that have not ended; otherwise they are a conflict"
    )


class VersionDeletionQuery(BaseModel):
    """The query of a deletion of a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    force: bool = Field(default=False, description="delete the challenger or the previous champion, too")


@router.delete(ADAPTER_PATH, tags=["adapters"])
def delete_adapter(
    tenant: str, adapter: str, query: Annotated[DeletionQuery, Query()], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Deletes an adapter with its versions, jobs, history, evaluations and waiting data; the tenant's files stay."""
    name = authorized_name(caller, tenant, adapter)
    removed = _delete_adapter(gateway, caller, name, cancel_jobs=query.cancel_jobs)
    return {"id": str(name), "object": "adapter", "deleted": True} | removed.model_dump()


@router.delete(ADAPTER_PATH + "/versions/{version}", tags=["adapters"])
def delete_version(
    tenant: str,
    adapter: str,
    version: str,
    query: Annotated[VersionDeletionQuery, Query()],
    gateway: GatewayDep,
    caller: CallerDep,
) -> dict[str, Any]:
    """Deletes one version, by its id or at least the first 8 digits of it; the champion can't be deleted."""
    name = authorized_name(caller, tenant, adapter)
    found = _delete_version(gateway, caller, name, version, force=query.force)
    return {"id": f"{name}@{found}", "object": "adapter.version", "deleted": True}


@router.post(ADAPTER_PATH + "/rename", tags=["adapters"])
def rename_adapter(
    tenant: str, adapter: str, body: RenameRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Renames an adapter with everything that belongs to it; after that, the old name is a 404."""
    name, to = authorized_name(caller, tenant, adapter), AdapterName.parse(body.to)
    with gateway.registry.writing() as session:
        renamed = renaming.rename(session, name, to)
        record_change(session, caller, "adapter.rename", str(name), tenant, to=str(to))
        return adapter_object(renamed)


@router.delete("/v1/models/{model:path}", tags=["inference"])
def delete_model(model: str, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Deletes an adapter, or one version of it if the name has an `@`, as the endpoints of adapters do."""
    name = ModelName.parse(model)
    if name.adapter is None:
        if name.base in gateway.served:
            raise InvalidRequest(
                f"'{model}' is a base, which is chosen when loramill starts and can't be deleted.", param="model"
            )
        raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
    caller.check_adapter(name.adapter.tenant)
    if "@" in model:
        _delete_version(gateway, caller, name.adapter, name.selector, force=False)
    else:
        _delete_adapter(gateway, caller, name.adapter, cancel_jobs=False)
    return {"id": model, "object": "model", "deleted": True}


@router.delete("/v1/tenants/{tenant}", tags=["tenants"])
def delete_tenant(
    tenant: str, query: Annotated[DeletionQuery, Query()], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Deletes a tenant with its keys, files, jobs and adapters. Usage and audit rows stay without its name."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        removed = deletion.delete_tenant(session, tenant, cancel_jobs=query.cancel_jobs)
        # The one row that keeps the name, as evidence of the deletion. It belongs to no tenant.
        record_change(session, caller, "tenant.delete", tenant, None, **_counts(removed))
    return {"id": tenant, "object": "tenant", "deleted": True} | removed.model_dump()


def _delete_adapter(gateway: Gateway, caller: Caller, name: AdapterName, *, cancel_jobs: bool) -> DeletionSummary:
    with gateway.registry.writing() as session:
        removed = deletion.delete_adapter(session, name, cancel_jobs=cancel_jobs)
        record_change(session, caller, "adapter.delete", str(name), name.tenant, **_counts(removed))
    return removed


def _delete_version(gateway: Gateway, caller: Caller, name: AdapterName, selector: str, *, force: bool) -> str:
    with gateway.registry.writing() as session:
        version = _resolve(session, name, selector)
        deletion.delete_version(session, name, version, force=force)
        record_change(session, caller, "version.delete", str(name), name.tenant, version=version)
    return version


def _resolve(session: Session, name: AdapterName, selector: str) -> str:
    adapters.get(session, name)
    return adapters.resolve(session, name, selector).id


def _counts(removed: DeletionSummary) -> dict[str, int]:
    """How much was deleted; ids of deleted things are of no use."""
    return {"versions": removed.versions, "jobs": removed.jobs, "files": removed.files}
