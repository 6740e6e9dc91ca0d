"""Ratings and corrections of the answers of stored completions."""

from __future__ import annotations

import secrets
import time

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, NotFound
from loramill.registry.database.tables import CompletionRow, FeedbackRow
from loramill.registry.feedback import completions
from loramill.registry.feedback.withdrawal import withdraw
from loramill.registry.pagination import newest_page
from loramill.registry.rollouts import traffic
from loramill.types import CompletionDeletion, FeedbackRecord, Rating

#: Fields of a record that are those of the completion.
_OF_COMPLETION = ("model", "adapter", "version", "user")


def give(
    session: Session,
    completion_id: str,
    tenant: str | None,
    *,
    choice: int = 0,
    rating: Rating | None = None,
    correction: str | None = None,
    reason: str | None = None,
) -> FeedbackRecord:
    """Rates or corrects an answer. It replaces what was given before; the same again changes nothing.

    A change withdraws what was made of the earlier feedback, unless something was trained on it; the new feedback is
    used again.

    Args:
        tenant: only a completion of this tenant; None: an admin, who may rate all.
        choice: index of the answer.

    Raises:
        NotFound: the tenant has no stored completion with this ID.
        InvalidRequest: the completion does not have such an answer.
    """
    completion = completions.get(session, completion_id, tenant)
    answers = len(completion.response["choices"])
    if not 0 <= choice < answers:
        raise InvalidRequest(
            f"'choice' is {choice}, and '{completion_id}' has {answers} answer{'' if answers == 1 else 's'}, counted "
            "from 0.",
            param="choice",
        )
    row, now = _find_or_add(session, completion, choice), time.time()
    given = (rating, correction, reason)
    if (row.rating, row.correction, row.reason) != given:
        if (row.rating, row.correction) != given[:2]:
            withdraw(session, row.tenant, [row])
            row.pair_used_at = row.pair_file = None
            if row.correction != correction:
                row.example_used_at = row.example_file = None
        if rating is not None and row.rating is None and completion.adapter and completion.version:
            good = rating is Rating.GOOD
            traffic.add_rating(session, completion.adapter, completion.version, good=good, now=now)
        row.rating, row.correction, row.reason = given
        row.updated_at = now
        session.flush()
    return _to_record(row, completion)


def list_feedback(
    session: Session,
    tenant: str | None,
    *,
    adapter: str | None = None,
    user: str | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[tuple[FeedbackRecord, CompletionRow]]:
    """Returns a page of a tenant's feedback, or of all tenants' (None), newest first, each with its completion.

    Args:
        adapter: only feedback on answers of this adapter (`tenant/adapter`).
        user: only feedback on answers to this user.

    Raises:
        NotFound: `after` is not the ID of feedback of the tenant.
    """
    wanted = [
        condition
        for condition in (
            CompletionRow.adapter == adapter if adapter is not None else None,
            CompletionRow.user == user if user is not None else None,
        )
        if condition is not None
    ]
    filters = [FeedbackRow.completion.in_(select(CompletionRow.id).where(*wanted))] if wanted else []
    rows = newest_page(session, FeedbackRow, tenant, after, limit, filters)
    found = {
        row.id: row
        for row in session.scalars(
            select(CompletionRow).where(CompletionRow.id.in_([each.completion for each in rows]))
        )
    }
    return [(_to_record(row, found[row.completion]), found[row.completion]) for row in rows]


def delete(session: Session, completion_id: str, tenant: str | None) -> CompletionDeletion:
    """Deletes the feedback on all answers of a stored completion, which itself stays.

    It is withdrawn from what nothing has been trained on yet.

    Raises:
        NotFound: the tenant has no stored completion with this ID, or it has no feedback.
    """
    completion = completions.get(session, completion_id, tenant)
    rows = session.scalars(select(FeedbackRow).where(FeedbackRow.completion == completion.id)).all()
    if not rows:
        raise NotFound(f"There is no feedback on the completion '{completion_id}'.", param="completion_id")
    files = withdraw(session, completion.tenant, rows)
    for row in rows:
        session.delete(row)
    session.flush()
    return CompletionDeletion(completions=0, feedback=len(rows), files=files)


def _find_or_add(session: Session, completion: CompletionRow, choice: int) -> FeedbackRow:
    """Returns the row of an answer's feedback, locked, or a new one."""
    statement = (
        select(FeedbackRow)
        .where(FeedbackRow.completion == completion.id, FeedbackRow.choice == choice)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    row = session.scalar(statement)
    if row is not None:
        return row
    now = time.time()
    try:
        with session.begin_nested():
            row = FeedbackRow(
                id=f"fb-{secrets.token_hex(12)}",
                tenant=completion.tenant,
                completion=completion.id,
                choice=choice,
                created_at=now,
                updated_at=now,
            )
            session.add(row)
    except IntegrityError as error:
        # Another request added it, or deleted the completion, in the meantime.
        row = session.scalar(statement)
        if row is None:
            raise NotFound(
                f"The stored completion '{completion.id}' was deleted in the meantime.", param="completion_id"
            ) from error
    return row


def _to_record(row: FeedbackRow, completion: CompletionRow) -> FeedbackRecord:
    own = {
        name: getattr(row, name)
        for name in FeedbackRecord.model_fields
        if name not in (*_OF_COMPLETION, "completion_id")
    }
    return FeedbackRecord(
        completion_id=row.completion, **own, **{name: getattr(completion, name) for name in _OF_COMPLETION}
    )
