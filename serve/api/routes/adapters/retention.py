"""The retention of adapters: what the clean-up removes, per adapter, and its removal at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from loramill.registry import adapters
from loramill.registry.retention.prune import plan, prune
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import Adapter, AdapterRemoval, PruneRequest, RetentionRequest
from loramill.serve.api.schemas.common import AdapterPath, ListObject, TenantPath, list_object
from loramill.types import Removal, RetentionPolicy

router = APIRouter(tags=["adapters"], responses=ERRORS)


@router.post(ADAPTER_PATH + "/retention", summary="Set an adapter's retention", responses=returns(Adapter))
def set_retention(
    tenant: TenantPath, adapter: AdapterPath, body: RetentionRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Gives an adapter a retention of its own, in place of the settings', or that of the settings again."""
    name = authorized_name(caller, tenant, adapter)
    policy = None if body.retention is None else RetentionPolicy.model_validate(body.retention.model_dump())
    with gateway.registry.writing() as session:
        changed = adapters.set_retention(session, name, policy)
        details = None if policy is None else policy.model_dump(exclude_none=True)
        record_change(session, caller, "adapter.retention", str(name), tenant, retention=details)
        return adapter_object(changed)


@router.post("/v1/adapters/prune", summary="Remove old versions", responses=returns(ListObject[AdapterRemoval]))
def prune_adapters(gateway: GatewayDep, caller: CallerDep, body: PruneRequest | None = None) -> dict[str, Any]:
    """Removes what the retention of the caller's adapters no longer keeps, as the supervisor does every hour.

    A version that an alias, an evaluation, an open job, a running nightly run or a request since yesterday refers to is
    never removed. The files are deleted at least an hour later.
    """
    registry, default, now = gateway.registry, gateway.settings.retention, time.time()

    def record(session: Session, adapter: str, removed: Sequence[Removal]) -> None:
        versions = [each.version for each in removed]
        record_change(session, caller, "adapter.prune", adapter, adapter.partition("/")[0], versions=versions)

    if body is not None and body.dry_run:
        with registry.reading() as session:
            removals = plan(session, default, now=now, tenant=caller.tenant)
    else:
        removals = prune(registry, default, now=now, tenant=caller.tenant, on_pruned=record)
    return list_object(removals, lambda each: each.model_dump() | {"object": "adapter.removal"})
