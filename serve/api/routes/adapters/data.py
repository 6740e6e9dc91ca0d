"""/v1/adapters/…/data: examples for the next nightly run."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from loramill.data.new_data import pairs_outlook
from loramill.errors import InvalidRequest
from loramill.names import AdapterName
from loramill.registry import adapters, nightly
from loramill.serve.api.dependencies import CallerDep, Gateway, GatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.adapters.common import ADAPTER_PATH, adapter_object, authorized_name
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.adapters import AdapterDataObject, AdapterWithData, NewDataRequest
from loramill.serve.api.schemas.common import AdapterPath, ListObject, TenantPath, list_object
from loramill.submission.references import find_file
from loramill.types import DatasetRecord

router = APIRouter(tags=["adapters"], responses=ERRORS)


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
    """Adds examples, or preference pairs, that the next nightly run trains the adapter on.

    If the adapter does not exist, it is created.
    """
    name = authorized_name(caller, tenant, adapter)
    pairs = _check_formats(gateway, name, body)
    with gateway.registry.writing() as session:
        find_file(session, body.training_file, tenant, "training_file")
        if body.validation_file is not None:
            find_file(session, body.validation_file, tenant, "validation_file")
        nightly.add_data(session, name, body.training_file, body.validation_file)
        record_change(
            session, caller, "adapter.data", str(name), tenant, train=body.training_file, valid=body.validation_file
        )
        waiting = nightly.new_data_state(session, name, gateway.settings.jobs.min_examples)
        record = adapters.get(session, name)
        if pairs:
            has_champion = record.champion is not None
            enough = waiting.enough and (has_champion or waiting.examples > pairs)
            outlook = pairs_outlook(pairs, has_champion=has_champion)
            waiting = waiting.model_copy(update={"enough": enough, "outlook": outlook})
        return adapter_object(record) | {"new_data": waiting.model_dump(mode="json")}


def _check_formats(gateway: Gateway, name: AdapterName, body: NewDataRequest) -> int:
    """Rejects new data of another format than the adapter's other data, since a job takes one format.

    Returns:
        The number of preference pairs to train on.

    Raises:
        InvalidRequest: a file does not exist or has answers with labels, or one has messages and another has prompts
            and completions.
    """
    with gateway.registry.reading() as session:
        train = find_file(session, body.training_file, name.tenant, "training_file")
        ids = [body.validation_file] if body.validation_file is not None else []
        valid = [find_file(session, each, name.tenant, "validation_file") for each in ids]
        trained = nightly.next_training_files(session, name)
    for param, file in (("training_file", train), *(("validation_file", each) for each in valid)):
        if gateway.dataset_checks.kind(file) == "labeled":
            raise InvalidRequest(
                f"{file.filename} holds answers with labels, on which nightly runs do not train: submit a job with it, "
                f"as in `loramill submit {name} --train {file.filename} --objective kto`.",
                param=param,
            )
    # Preferences that the champion was trained on are not trained again.
    existing = [each for each in trained if gateway.dataset_checks.kind(each) == "supervised"]
    chat = gateway.dataset_checks.is_chat(train)
    for param, file, others in (("validation_file", train, valid), ("training_file", train, existing)):
        for other in others:
            if gateway.dataset_checks.is_chat(other) != chat:
                raise InvalidRequest(_format_mismatch(file, other, name, chat=chat), param=param)
    return train.examples if gateway.dataset_checks.kind(train) == "preference" else 0


def _format_mismatch(file: DatasetRecord, other: DatasetRecord, name: AdapterName, *, chat: bool) -> str:
    own, others = ("messages", "prompts and completions") if chat else ("prompts and completions", "messages")
    columns, drop = "--columns instruction=prompt,output=completion", f"loramill nightly drop {name}"
    return (
        f"{file.filename} holds {own}, but {other.filename}, which '{name}' uses too, holds {others}; a nightly run "
        f"needs one format: `{columns}` makes messages of prompts and completions, and `{drop}` drops the waiting data."
    )
