"""/v1/feedback: ratings and corrections of stored completions, and the deletion of a user's data."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Query

from loramill.registry.database.tables import CompletionRow
from loramill.registry.feedback import completions, ratings
from loramill.serve.api.dependencies import CallerDep, WrittenGatewayDep
from loramill.serve.api.responses import ERRORS, returns
from loramill.serve.api.routes.audit import record_change
from loramill.serve.api.routes.feedback.stored import CompletionIdPath
from loramill.serve.api.schemas.common import ListObject, page_object
from loramill.serve.api.schemas.feedback import (
    Feedback,
    FeedbackDeleted,
    FeedbackListQuery,
    FeedbackRequest,
    UserQuery,
)
from loramill.types import CompletionDeletion, CompletionKind, FeedbackRecord

router = APIRouter(tags=["feedback"], responses=ERRORS)

FEEDBACK_PATH = "/v1/feedback"


@router.post(FEEDBACK_PATH, summary="Rate or correct an answer", responses=returns(Feedback))
def give_feedback(body: FeedbackRequest, gateway: WrittenGatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Rates an answer of a stored completion, or gives the answer as it should have been; the latest call counts."""
    with gateway.registry.writing(invalidate_caches=False) as session:
        record = ratings.give(
            session,
            body.completion_id,
            caller.tenant,
            choice=body.choice,
            rating=body.rating_value,
            correction=body.correction,
            reason=body.reason,
        )
        record_change(
            session,
            caller,
            "feedback.give",
            record.id,
            record.tenant,
            completion=record.completion_id,
            choice=record.choice,
            rating=record.rating,
            corrected=record.correction is not None,
        )
    return _feedback_object(record)


@router.get(FEEDBACK_PATH, summary="List feedback", responses=returns(ListObject[Feedback]))
def list_feedback(
    query: Annotated[FeedbackListQuery, Query()], gateway: WrittenGatewayDep, caller: CallerDep
) -> dict[str, Any]:
    """Lists ratings and corrections of the caller's stored completions, newest first."""
    with gateway.registry.reading() as session:
        rows = ratings.list_feedback(
            session,
            caller.tenant,
            adapter=query.adapter,
            user=query.user,
            after=query.after,
            limit=query.limit + 1,
        )
        return page_object(
            rows,
            query.limit,
            lambda row: _feedback_object(row[0]) | {"texts": _texts(*row) if query.texts else None},
        )


@router.delete(FEEDBACK_PATH, summary="Delete a user's completions and feedback", responses=returns(FeedbackDeleted))
def delete_user(query: Annotated[UserQuery, Query()], gateway: WrittenGatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Deletes all stored completions of a user, with their feedback, which no further nightly run uses.

    Completions that ended before this call are not stored afterwards, by any gateway.
    """
    tenant = caller.require_tenant()
    with gateway.registry.writing(invalidate_caches=False) as session:
        removed = completions.delete_user(session, tenant, query.user)
        # The audit outlives the deletion, so it has a hash in place of the user.
        user = f"user-{hashlib.sha256(query.user.encode()).hexdigest()[:16]}"
        record_change(session, caller, "feedback.delete_user", user, tenant, **removed.model_dump(mode="json"))
    return _deleted_object(removed)


@router.delete(FEEDBACK_PATH + "/{completion_id}", summary="Delete feedback", responses=returns(FeedbackDeleted))
def delete_feedback(completion_id: CompletionIdPath, gateway: WrittenGatewayDep, caller: CallerDep) -> dict[str, Any]:
    """Deletes the feedback on a stored completion, which itself stays."""
    with gateway.registry.writing(invalidate_caches=False) as session:
        owner = completions.get(session, completion_id, caller.tenant).tenant
        removed = ratings.delete(session, completion_id, caller.tenant)
        record_change(session, caller, "feedback.delete", completion_id, owner, files=list(removed.files))
    return _deleted_object(removed)


def _feedback_object(record: FeedbackRecord) -> dict[str, Any]:
    return record.model_dump() | {"object": "feedback", "texts": None}


def _deleted_object(removed: CompletionDeletion) -> dict[str, Any]:
    return removed.model_dump() | {"object": "feedback.deleted", "deleted": True}


def _texts(record: FeedbackRecord, completion: CompletionRow) -> dict[str, Any]:
    request, choice = completion.request, completion.response["choices"][record.choice]
    if completion.kind is CompletionKind.CHAT:
        return {
            "messages": request["messages"],
            "tools": request["tools"],
            "prompt": None,
            "answer": choice["message"],
        }
    return {
        "messages": None,
        "tools": None,
        "prompt": request["prompts"][record.choice // request["n"]],
        "answer": choice["text"],
    }
