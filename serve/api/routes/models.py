"""GET /v1/models: the base, and each adapter the caller may use that has a champion."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from loramill.registry import adapters
from loramill.serve.api.dependencies import Here, Who
from loramill.serve.api.generation.model_lookup import created, find_model
from loramill.serve.api.schemas.common import list_of

router = APIRouter(tags=["inference"])


@router.get("/v1/models")
def list_models(here: Here, who: Who) -> dict[str, Any]:
    """Names that can be asked."""
    with here.registry.reading() as session:
        records = adapters.list_of(session, who.tenant)
    models = [_model(name, created(served.base), "loramill") for name, served in here.served.items()]
    models += [_model(record.name, record.created_at, record.tenant) for record in records if record.champion]
    return list_of(models, lambda model: model)


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, here: Here, who: Who) -> dict[str, Any]:
    """Whether one name can be asked, aliases and versions included."""
    target = await find_model(here, who, model)
    owner = model.partition("/")[0] if target.version else "loramill"
    return _model(model, target.created_at, owner) | {"version": target.version}


def _model(name: str, created: float, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": owner}
