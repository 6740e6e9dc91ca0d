"""Stored completions: OpenAI's endpoints for chat completions, and the same for text completions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request

from loramill.registry.feedback import completions
from loramill.serve.api.dependencies import CallerDep, Gateway, WrittenGatewayDep
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.schemas.common import ListObject, page_object
from loramill.serve.api.schemas.feedback import (
    CompletionListQuery,
    CompletionUpdate,
    DeletedChatCompletion,
    DeletedCompletion,
    MessageListQuery,
    StoredChatCompletion,
    StoredCompletion,
    StoredMessage,
)
from loramill.serve.api.schemas.metadata_query import query_parameters, read_query
from loramill.types import CompletionKind, CompletionRecord

router = APIRouter(tags=["feedback"], responses=ERRORS)

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"

CompletionIdPath = Annotated[
    str, Path(description="ID of the stored completion.", json_schema_extra={"pattern": "^[^/]+$"})
]


async def _list_query(request: Request) -> CompletionListQuery:
    return read_query(request, CompletionListQuery, "Completions")


ListQueryDep = Annotated[CompletionListQuery, Depends(_list_query)]
_LIST_PARAMETERS = query_parameters(CompletionListQuery)


@router.get(
    CHAT_PATH,
    openapi_extra=_LIST_PARAMETERS,
    summary="List stored chat completions",
    responses=returns(ListObject[StoredChatCompletion]),
)
def list_chat_completions(query: ListQueryDep, gateway: WrittenGatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the caller's stored chat completions, oldest first unless `order` is `desc`. All filters must match."""
    return _list(gateway, caller, query, CompletionKind.CHAT)


@router.get(
    TEXT_PATH,
    openapi_extra=_LIST_PARAMETERS,
    summary="List stored completions",
    responses=returns(ListObject[StoredCompletion]),
)
def list_text_completions(query: ListQueryDep, gateway: WrittenGatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Lists the caller's stored text completions, oldest first unless `order` is `desc`. All filters must match."""
    return _list(gateway, caller, query, CompletionKind.TEXT)


@router.get(
    CHAT_PATH + "/{completion_id}", summary="Retrieve a stored chat completion", responses=returns(StoredChatCompletion)
)
def retrieve_chat_completion(
    completion_id: CompletionIdPath, gateway: WrittenGatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Returns a stored chat completion."""
    return _retrieve(gateway, caller, completion_id, CompletionKind.CHAT)


@router.get(
    TEXT_PATH + "/{text_completion_id}", summary="Retrieve a stored completion", responses=returns(StoredCompletion)
)
def retrieve_text_completion(
    text_completion_id: CompletionIdPath, gateway: WrittenGatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Returns a stored text completion."""
    return _retrieve(gateway, caller, text_completion_id, CompletionKind.TEXT)


@router.get(
    CHAT_PATH + "/{completion_id}/messages",
    summary="List the messages of a stored chat completion",
    responses=returns(ListObject[StoredMessage]),
)
def list_messages(
    completion_id: CompletionIdPath,
    query: Annotated[MessageListQuery, Query()],
    gateway: WrittenGatewayDep,
    caller: CallerDep,
) -> dict[str, Any]:
    """Lists the messages of the request; the answers are in the completion itself."""
    with gateway.registry.reading() as session:
        row = completions.get(session, completion_id, caller.tenant, CompletionKind.CHAT)
        messages = [{"id": f"{row.id}-{index}", **each} for index, each in enumerate(row.request["messages"])]
    if query.order == "desc":
        messages.reverse()
    ids = [each["id"] for each in messages]
    # As in OpenAI's API, an unknown `after` starts at the beginning.
    start = ids.index(query.after) + 1 if query.after in ids else 0
    return page_object(messages[start : start + query.limit + 1], query.limit, lambda message: message)


@router.post(
    CHAT_PATH + "/{completion_id}",
    summary="Change a stored chat completion",
    responses=returns(StoredChatCompletion),
)
def update_chat_completion(
    completion_id: CompletionIdPath, body: CompletionUpdate, gateway: WrittenGatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Replaces the metadata of a stored chat completion."""
    with gateway.registry.writing(invalidate_caches=False) as session:
        record = completions.set_metadata(session, completion_id, caller.tenant, CompletionKind.CHAT, body.metadata)
        record_change(session, caller, "completion.update", record.id, record.tenant)
    return stored_object(record)


@router.delete(
    CHAT_PATH + "/{completion_id}",
    summary="Delete a stored chat completion",
    responses=returns(DeletedChatCompletion),
)
def delete_chat_completion(
    completion_id: CompletionIdPath, gateway: WrittenGatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Deletes a stored chat completion with its feedback, which no further nightly run uses."""
    return _delete(gateway, caller, completion_id, CompletionKind.CHAT)


@router.delete(
    TEXT_PATH + "/{text_completion_id}", summary="Delete a stored completion", responses=returns(DeletedCompletion)
)
def delete_text_completion(
    text_completion_id: CompletionIdPath, gateway: WrittenGatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Deletes a stored text completion with its feedback, which no further nightly run uses."""
    return _delete(gateway, caller, text_completion_id, CompletionKind.TEXT)


def stored_object(record: CompletionRecord) -> dict[str, Any]:
    """Returns the object of a stored completion."""
    return {**record.response, "metadata": record.metadata, "user": record.user}


def _list(gateway: Gateway, caller: Caller, query: CompletionListQuery, kind: CompletionKind) -> dict[str, Any]:
    with gateway.registry.reading() as session:
        records = completions.list_completions(
            session,
            caller.tenant,
            kind,
            model=query.model,
            metadata=query.metadata,
            after=query.after,
            limit=query.limit + 1,
            oldest_first=query.order == "asc",
        )
    return page_object(records, query.limit, stored_object)


def _retrieve(gateway: Gateway, caller: Caller, completion_id: str, kind: CompletionKind) -> dict[str, Any]:
    with gateway.registry.reading() as session:
        return stored_object(completions.to_record(completions.get(session, completion_id, caller.tenant, kind)))


def _delete(gateway: Gateway, caller: Caller, completion_id: str, kind: CompletionKind) -> dict[str, Any]:
    with gateway.registry.writing(invalidate_caches=False) as session:
        owner = completions.get(session, completion_id, caller.tenant, kind).tenant
        removed = completions.delete(session, completion_id, caller.tenant, kind)
        record_change(session, caller, "completion.delete", completion_id, owner, files=list(removed.files))
    return {"id": completion_id, "object": f"{kind}.deleted", "deleted": True, "files": list(removed.files)}
