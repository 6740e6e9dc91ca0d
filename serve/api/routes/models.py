"""GET /v1/models: the base models, and the adapters of the caller that have a champion."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from loramill.registry import adapters
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.generation.model_lookup import base_created_at, find_model
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.schemas.adapters import ModelObject
from loramill.serve.api.schemas.common import ListObject, ModelPath, list_object

router = APIRouter(tags=["inference"], responses=ERRORS)


@router.get("/v1/models", summary="List models", responses=returns(ListObject[ModelObject]))
def list_models(gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the base models, and the adapters of the caller that have a champion."""
    with gateway.registry.reading() as session:
        records = adapters.list_adapters(session, caller.tenant)
    models = [_model_object(name, base_created_at(served.base), "loramill") for name, served in gateway.served.items()]
    models += [_model_object(record.name, record.created_at, record.tenant) for record in records if record.champion]
    return list_object(models, lambda model: model)


@router.get("/v1/models/{model:path}", summary="Retrieve a model", responses=returns(ModelObject))
async def retrieve_model(model: ModelPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Returns a model by any name that requests may use, including aliases and versions."""
    target = await find_model(gateway, caller, model)
    owner = model.partition("/")[0] if target.version else "loramill"
    return _model_object(model, target.created_at, owner) | {"version": target.version}


def _model_object(name: str, created: float, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": owner}
