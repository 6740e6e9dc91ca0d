"""Feedback that nightly runs have not used yet, and the marks of what they used."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry.database.tables import CompletionRow, FeedbackRow, TenantRow
from loramill.registry.feedback.completions import to_record
from loramill.types import CompletionRecord, FrozenModel, Rating


class UnusedFeedback(FrozenModel):
    """Feedback on one answer that a nightly run can use.

    Attributes:
        id: ID of the feedback.
        completion: the stored completion.
        for_example: the correction was not made an example yet.
        for_pair: the rating or the correction was not made a part of a pair yet.
    """

    id: str
    completion: CompletionRecord
    choice: int
    rating: Rating | None
    correction: str | None
    for_example: bool
    for_pair: bool


def adapters_with_unused(session: Session) -> list[str]:
    """Returns the adapters of consenting tenants with feedback that no nightly run has used."""
    statement = (
        select(CompletionRow.adapter)
        .join(FeedbackRow, FeedbackRow.completion == CompletionRow.id)
        .join(TenantRow, TenantRow.name == CompletionRow.tenant)
        .where(CompletionRow.adapter.is_not(None), TenantRow.store_completions.is_(True), _UNUSED)
        .distinct()
    )
    return sorted(adapter for adapter in session.scalars(statement) if adapter is not None)


def lock_unused(session: Session, name: AdapterName | str) -> list[UnusedFeedback]:
    """Returns an adapter's unused feedback, oldest first, and locks it until the transaction ends.

    There is none if the tenant has withdrawn its consent.
    """
    statement = (
        select(FeedbackRow, CompletionRow)
        .join(CompletionRow, FeedbackRow.completion == CompletionRow.id)
        .join(TenantRow, TenantRow.name == CompletionRow.tenant)
        .where(CompletionRow.adapter == str(name), TenantRow.store_completions.is_(True), _UNUSED)
        .order_by(FeedbackRow.created_at, FeedbackRow.id)
        .with_for_update(of=FeedbackRow)
    )
    return [
        UnusedFeedback(
            id=row.id,
            completion=to_record(completion),
            choice=row.choice,
            rating=row.rating,
            correction=row.correction,
            for_example=row.correction is not None and row.example_used_at is None,
            for_pair=row.pair_used_at is None,
        )
        for row, completion in session.execute(statement).tuples()
    ]


def mark_examples(session: Session, ids: Iterable[str], file: str | None) -> None:
    """Records that corrections are examples of a file, or can't be examples (None)."""
    marks = {"example_used_at": time.time(), "example_file": file}
    session.execute(update(FeedbackRow).where(FeedbackRow.id.in_(list(ids))).values(**marks))


def mark_pairs(session: Session, ids: Iterable[str], file: str | None) -> None:
    """Records that feedback is in pairs of a file, or can't be in one (None)."""
    marks = {"pair_used_at": time.time(), "pair_file": file}
    session.execute(update(FeedbackRow).where(FeedbackRow.id.in_(list(ids))).values(**marks))


_UNUSED = or_(
    FeedbackRow.correction.is_not(None) & FeedbackRow.example_used_at.is_(None), FeedbackRow.pair_used_at.is_(None)
)
