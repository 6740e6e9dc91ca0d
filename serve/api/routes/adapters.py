"""/v1/adapters: adapters, the aliases of their versions, and data for the next nightly run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from loramill.errors import InvalidRequest
from loramill.names import AdapterName
from loramill.registry import adapters, evaluations, nightly
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.generation.admission import admitted
from loramill.serve.api.generation.model_lookup import find_model
from loramill.serve.api.generation.streaming import collect
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import (
    Adapter,
    AdapterDataObject,
    AdapterHistory,
    AdapterWarm,
    AdapterWithData,
    NewDataRequest,
    PromotionRequest,
    VersionSelector,
)
from loramill.serve.api.schemas.common import AdapterPath, ListObject, TenantPath, list_object
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.submission.references import find_file, named_by
from loramill.types import AdapterRecord, DatasetRecord, FrozenModel

router = APIRouter(tags=["adapters"], responses=ERRORS)

ADAPTER_PATH = "/v1/adapters/{tenant}/{adapter}"


@router.get("/v1/adapters", summary="List adapters", responses=returns(ListObject[Adapter]))
def list_adapters(gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the caller's adapters."""
    with gateway.registry.reading() as session:
        return list_object(adapters.list_adapters(session, caller.tenant), adapter_object)


@router.get(ADAPTER_PATH, summary="Retrieve an adapter", responses=returns(AdapterHistory))
def retrieve_adapter(
    tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Returns an adapter with its versions, the history of its aliases, and its evaluations."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        return adapter_object(adapters.get(session, name)) | {
            "versions": _dump(adapters.list_versions(session, name)),
            "history": _dump(adapters.alias_history(session, name)),
            "evaluations": _dump(evaluations.list_evaluations(session, name)),
        }


@router.post(ADAPTER_PATH + "/promote", summary="Promote a version", responses=returns(Adapter))
def promote(
    tenant: TenantPath, adapter: AdapterPath, body: PromotionRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Makes a version the champion. It answers from the next request on."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        adapters.get(session, name)
        with named_by("version"):
            version = adapters.resolve(session, name, body.version)
        promoted = adapters.promote(session, name, version.id, f"promoted with {caller.key_id}")
        record_change(session, caller, "adapter.promote", str(name), tenant, version=version.id)
        return adapter_object(promoted)


@router.post(ADAPTER_PATH + "/rollback", summary="Roll back", responses=returns(Adapter))
def rollback(tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Makes the previous champion the champion again."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        rolled_back = adapters.rollback(session, name, f"rolled back with {caller.key_id}")
        record_change(session, caller, "adapter.rollback", str(name), tenant, version=rolled_back.champion)
        return adapter_object(rolled_back)


@router.post(ADAPTER_PATH + "/pin", summary="Pin a version", responses=returns(Adapter))
def pin(
    tenant: TenantPath,
    adapter: AdapterPath,
    gateway: GatewayDep,
    caller: CallerDep,
    body: VersionSelector | None = None,
) -> dict[str, Any]:
    """Makes a version the champion until it is unpinned: nightly runs, promotions and rollbacks do not change it."""
    name, selected = authorized_name(caller, tenant, adapter), body or VersionSelector()
    with gateway.registry.writing() as session:
        version = _resolve(session, name, selected)
        pinned = adapters.pin(session, name, version, f"pinned with {caller.key_id}")
        record_change(session, caller, "adapter.pin", str(name), tenant, version=version)
        return adapter_object(pinned)


@router.post(ADAPTER_PATH + "/unpin", summary="Unpin", responses=returns(Adapter))
def unpin(tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Allows the champion to change again."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.writing() as session:
        adapters.get(session, name)
        unpinned = adapters.unpin(session, name)
        record_change(session, caller, "adapter.unpin", str(name), tenant)
        return adapter_object(unpinned)


@router.post(ADAPTER_PATH + "/warm", summary="Load a version", responses=returns(AdapterWarm))
async def warm(
    tenant: TenantPath,
    adapter: AdapterPath,
    gateway: GatewayDep,
    caller: CallerDep,
    body: VersionSelector | None = None,
) -> dict[str, Any]:
    """Loads a version where its requests are routed, by generating one token, which counts as usage."""
    name, selected = authorized_name(caller, tenant, adapter), body or VersionSelector()
    version = await run_in_threadpool(_resolve_in_session, gateway, name, selected)
    target = await find_model(gateway, caller, f"{name}@{version}")
    request = TextRequest(
        id=f"warm-{uuid.uuid4().hex}",
        tenant=target.tenant,
        version=target.version,
        prompt="Hello",
        sampling_params=SamplingParams(max_tokens=1),
    )
    began = time.perf_counter()
    async with admitted(gateway, caller, target, [request]) as admission:
        await collect(admission.chunks, 1)
    seconds = time.perf_counter() - began
    await run_in_threadpool(_record_warm_up, gateway, caller, name, version)
    return {"object": "adapter.warm", "adapter": str(name), "version": version, "seconds": round(seconds, 3)}


@router.get(
    ADAPTER_PATH + "/data", summary="List data for nightly runs", responses=returns(ListObject[AdapterDataObject])
)
def list_data(tenant: TenantPath, adapter: AdapterPath, gateway: GatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the adapter's data for nightly runs, newest first. `run` is null while data waits for the next run."""
    name = authorized_name(caller, tenant, adapter)
    with gateway.registry.reading() as session:
        return list_object(
            nightly.list_data(session, name), lambda data: data.model_dump() | {"object": "adapter.data"}
        )


@router.post(ADAPTER_PATH + "/data", summary="Add data for nightly runs", responses=returns(AdapterWithData))
def add_data(
    tenant: TenantPath, adapter: AdapterPath, body: NewDataRequest, gateway: GatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Adds examples that the next nightly run trains the adapter on. If the adapter does not exist, it is created."""
    name = authorized_name(caller, tenant, adapter)
    _check_formats(gateway, name, body)
    with gateway.registry.writing() as session:
        find_file(session, body.training_file, tenant, "training_file")
        if body.validation_file is not None:
            find_file(session, body.validation_file, tenant, "validation_file")
        nightly.add_data(session, name, body.training_file, body.validation_file)
        record_change(
            session, caller, "adapter.data", str(name), tenant, train=body.training_file, valid=body.validation_file
        )
        waiting = nightly.new_data_state(session, name, gateway.settings.jobs.min_examples)
        return adapter_object(adapters.get(session, name)) | {"new_data": waiting.model_dump(mode="json")}


def authorized_name(caller: Caller, tenant: str, adapter: str) -> AdapterName:
    """Returns the adapter's name if the caller may use it.

    Raises:
        Forbidden: the adapter belongs to another tenant, whether it exists or not.
        InvalidRequest: the name is invalid.
    """
    caller.check_adapter(tenant)
    return AdapterName.parse(f"{tenant}/{adapter}")


def adapter_object(record: AdapterRecord) -> dict[str, Any]:
    """Returns an adapter object."""
    return record.model_dump() | {"id": record.name, "object": "adapter"}


def _resolve(session: Session, name: AdapterName, selected: VersionSelector) -> str:
    adapters.get(session, name)
    with named_by("version"):
        return adapters.resolve(session, name, selected.version).id


def _resolve_in_session(gateway: Gateway, name: AdapterName, selected: VersionSelector) -> str:
    with gateway.registry.reading() as session:
        return _resolve(session, name, selected)


def _record_warm_up(gateway: Gateway, caller: Caller, name: AdapterName, version: str) -> None:
    with gateway.registry.writing() as session:
        record_change(session, caller, "adapter.warm", str(name), name.tenant, version=version)


def _check_formats(gateway: Gateway, name: AdapterName, body: NewDataRequest) -> None:
    """Rejects new data of another format than the adapter's other data, since a job takes one format.

    Raises:
        InvalidRequest: a file does not exist, or one has messages and another has prompts and completions.
    """
    with gateway.registry.reading() as session:
        train = find_file(session, body.training_file, name.tenant, "training_file")
        ids = [body.validation_file] if body.validation_file is not None else []
        valid = [find_file(session, each, name.tenant, "validation_file") for each in ids]
        existing = nightly.next_training_files(session, name)
    chat = gateway.dataset_checks.is_chat(train)
    for param, file, others in (("validation_file", train, valid), ("training_file", train, existing)):
        for other in others:
            if gateway.dataset_checks.is_chat(other) != chat:
                raise InvalidRequest(_format_mismatch(file, other, name, chat=chat), param=param)


def _format_mismatch(file: DatasetRecord, other: DatasetRecord, name: AdapterName, *, chat: bool) -> str:
    own, others = ("messages", "prompts and completions") if chat else ("prompts and completions", "messages")
    columns, drop = "--columns instruction=prompt,output=completion", f"loramill nightly drop {name}"
    return (
        f"{file.filename} holds {own}, but {other.filename}, which '{name}' uses too, holds {others}; a nightly run "
        f"needs one format: `{columns}` makes messages of prompts and completions, and `{drop}` drops the waiting data."
    )


def _dump(records: Sequence[FrozenModel]) -> list[dict[str, Any]]:
    return [record.model_dump(mode="json") for record in records]
