"""Deletes adapters, versions, models and tenants, and renames adapters.

The response follows the commit. From then on this gateway rejects the name, and all others do within half a second.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, ModelNotFound
from loramill.names import AdapterName, ModelName
from loramill.registry import adapters, deletion, renaming
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import (
    Adapter,
    AdapterDeleted,
    DeletionQuery,
    ModelDeleted,
    RenameRequest,
    VersionDeleted,
    VersionDeletionQuery,
)
from loramill.serve.api.schemas.common import AdapterPath, ModelPath, TenantPath, VersionPath
from loramill.serve.api.schemas.tenants import TenantDeleted
from loramill.types import DeletionSummary

router = APIRouter(responses=ERRORS)


@router.delete(ADAPTER_PATH, tags=["adapters"], summary="Delete an adapter", responses=returns(AdapterDeleted))
def delete_adapter(
    tenant: TenantPath,
    adapter: AdapterPath,
    query: Annotated[DeletionQuery, Query()],
    gateway: GatewayDep,
    caller: CallerDep,
) -> dict[str, Any]:
    """Deletes an adapter with its versions, jobs, history, evaluations and waiting data, but not the tenant's files."""
    name = authorized_name(caller, tenant, adapter)
    removed = _delete_adapter(gateway, caller, name, cancel_jobs=query.cancel_jobs)
    return {"id": str(name), "object": "adapter", "deleted": True} | removed.model_dump()


@router.delete(
    ADAPTER_PATH + "/versions/{version}",
    tags=["adapters"],
    summary="Delete a version",
    responses=returns(VersionDeleted),
)
def delete_version(
    tenant: TenantPath,
    adapter: AdapterPath,
    version: VersionPath,
    query: Annotated[VersionDeletionQuery, Query()],
    gateway: GatewayDep,
    caller: CallerDep,
) -> dict[str, Any]:
    """Deletes one version of an adapter. The champion cannot be deleted."""
    name = authorized_name(caller, tenant, adapter)
    found = _delete_version(gateway, caller, name, version, force=query.force)
    return {"id": f"{name}@{found}", "object": "adapter.version", "deleted": True}


@router.post(ADAPTER_PATH + "/rename", tags=["adapters"], summary="Rename an adapter", responses=returns(Adapter))
def rename_adapter(
    tenant: TenantPath, adapter: AdapterPath, body: RenameRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Renames an adapter with everything that belongs to it. Afterwards, the old name does not exist (404)."""
    name, to = authorized_name(caller, tenant, adapter), AdapterName.parse(body.to)
    with gateway.registry.writing() as session:
        renamed = renaming.rename(session, name, to)
        record_change(session, caller, "adapter.rename", str(name), tenant, to=str(to))
        return adapter_object(renamed)


@router.delete("/v1/models/{model:path}", tags=["inference"], summary="Delete a model", responses=returns(ModelDeleted))
def delete_model(model: ModelPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Deletes an adapter, or one version if the name has an `@`."""
    name = ModelName.parse(model)
    if name.adapter is None:
        if name.base in gateway.served:
            raise InvalidRequest(
                f"'{model}' is a base model, which is set when loramill starts and cannot be deleted.", param="model"
            )
        raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
    caller.check_adapter(name.adapter.tenant)
    if "@" in model:
        _delete_version(gateway, caller, name.adapter, name.selector, force=False)
    else:
        _delete_adapter(gateway, caller, name.adapter, cancel_jobs=False)
    return {"id": model, "object": "model", "deleted": True}


@router.delete("/v1/tenants/{tenant}", tags=["tenants"], summary="Delete a tenant", responses=returns(TenantDeleted))
def delete_tenant(
    tenant: TenantPath, query: Annotated[DeletionQuery, Query()], gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Deletes a tenant with its keys, files, jobs and adapters. Its usage and audit log stay, without its name."""
    caller.check_admin()
    with gateway.registry.writing() as session:
        removed = deletion.delete_tenant(session, tenant, cancel_jobs=query.cancel_jobs)
        # This one row keeps the name, as evidence of the deletion. It belongs to no tenant.
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
    """Numbers of deleted things. Their ids are of no use."""
    return {"versions": removed.versions, "jobs": removed.jobs, "files": removed.files}
