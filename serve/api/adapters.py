"""/v1/adapters: versions, promotion, rollback, and data for the next night."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from loramill.names import AdapterName
from loramill.registry import adapters, evaluations, nightly
from loramill.serve.api.auth import Caller
from loramill.serve.api.gateway import Here, Who
from loramill.serve.api.references import find_file, named_by
from loramill.serve.api.wire import Body, list_of
from loramill.types import AdapterRecord, Value

router = APIRouter(tags=["adapters"])

PATH = "/v1/adapters/{tenant}/{adapter}"


class Promotion(Body):
    """Which version becomes the champion: an alias, or a version's id or the first 8 digits of it or more."""

    version: str


class NewData(Body):
    """Files that the next night trains on."""

    training_file: str
    validation_file: str | None = None


@router.get("/v1/adapters")
def list_adapters(here: Here, who: Who) -> dict[str, Any]:
    """The caller's adapters."""
    with here.registry.reading() as session:
        return list_of(adapters.list_of(session, who.tenant), _adapter)


@router.get(PATH)
def retrieve_adapter(tenant: str, adapter: str, here: Here, who: Who) -> dict[str, Any]:
    """An adapter with its versions, the history of its aliases, and its evaluations, each newest first."""
    name = _allowed(who, tenant, adapter)
    with here.registry.reading() as session:
        return _adapter(adapters.get(session, name)) | {
            "versions": _dump(adapters.versions(session, name)),
            "history": _dump(adapters.history(session, name)),
            "evaluations": _dump(evaluations.list_of(session, name)),
        }


@router.post(PATH + "/promote")
def promote(tenant: str, adapter: str, body: Promotion, here: Here, who: Who) -> dict[str, Any]:
    """Makes a version the champion: the one that answers from the next request on."""
    name = _allowed(who, tenant, adapter)
    with here.registry.writing() as session:
        adapters.get(session, name)
        with named_by("version"):
            version = adapters.resolve(session, name, body.version)
        return _adapter(adapters.promote(session, name, version.id, f"promoted with {who.key}"))


@router.post(PATH + "/rollback")
def rollback(tenant: str, adapter: str, here: Here, who: Who) -> dict[str, Any]:
    """Makes the previous champion the champion again."""
    name = _allowed(who, tenant, adapter)
    with here.registry.writing() as session:
        return _adapter(adapters.rollback(session, name, f"rolled back with {who.key}"))


@router.post(PATH + "/data")
def add_data(tenant: str, adapter: str, body: NewData, here: Here, who: Who) -> dict[str, Any]:
    """Gives the adapter, made if there is none, examples from which the next night trains it."""
    name = _allowed(who, tenant, adapter)
    with here.registry.writing() as session:
        find_file(session, body.training_file, tenant, "training_file")
        if body.validation_file is not None:
            find_file(session, body.validation_file, tenant, "validation_file")
        nightly.add_data(session, name, body.training_file, body.validation_file)
        return _adapter(adapters.get(session, name))


def _allowed(who: Caller, tenant: str, adapter: str) -> AdapterName:
    who.check_adapter(tenant)
    return AdapterName.parse(f"{tenant}/{adapter}")


def _adapter(record: AdapterRecord) -> dict[str, Any]:
    return record.model_dump() | {"id": record.name, "object": "adapter"}


def _dump(records: Sequence[Value]) -> list[dict[str, Any]]:
    return [record.model_dump(mode="json") for record in records]
