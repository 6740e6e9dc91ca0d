"""Stored completions of tenants that consent, until they are deleted or their retention ends."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import InstrumentedAttribute, Session

from loramill.errors import NotFound
from loramill.registry import tenants
from loramill.registry.database.tables import AdapterRow, CompletionRow, DeletedUserRow, FeedbackRow, TenantRow
from loramill.registry.feedback.withdrawal import withdraw
from loramill.registry.pagination import newest_page
from loramill.types import CompletionDeletion, CompletionKind, CompletionRecord

_DAY_SECONDS = 86_400.0
#: Days for which a deleted user is remembered, as a hash: longer than a gateway waits to write, while the database is
#: unavailable.
DELETION_DAYS = 7


def add_many(session: Session, records: Sequence[CompletionRecord]) -> int:
    """Stores completions; returns how many.

    Not stored are those that are stored already, since a gateway repeats a batch of which it does not know whether it
    was committed, and those whose tenant has withdrawn its consent, or whose adapter or user was deleted, in the
    meantime.
    """
    # Locked against deletion until the transaction ends, as are the adapters.
    owners = [each.tenant for each in records]
    consenting = _existing(session, TenantRow.name, owners, TenantRow.store_completions.is_(True))
    adapters = _existing(session, AdapterRow.name, [each.adapter for each in records if each.adapter is not None])
    stored = set(session.scalars(select(CompletionRow.id).where(CompletionRow.id.in_([each.id for each in records]))))
    deleted = _deletions(session, records)
    new = [
        each
        for each in {record.id: record for record in records}.values()
        if each.id not in stored and each.tenant in consenting and (each.adapter is None or each.adapter in adapters)
        if each.user is None or each.created_at > deleted.get(_user_digest(each.tenant, each.user), 0.0)
    ]
    session.add_all(
        CompletionRow(
            labels=each.metadata,
            bytes=len(each.model_dump_json()),
            **each.model_dump(exclude={"metadata"}, mode="python"),
        )
        for each in new
    )
    session.flush()
    return len(new)


def get(session: Session, completion_id: str, tenant: str | None, kind: CompletionKind | None = None) -> CompletionRow:
    """Returns a stored completion's row.

    Args:
        tenant: only a completion of this tenant; None: an admin, who sees all.
        kind: only one of this kind.

    Raises:
        NotFound: the tenant has no stored completion with this ID.
    """
    row = session.get(CompletionRow, completion_id)
    if row is None or tenant not in (None, row.tenant) or kind not in (None, row.kind):
        raise NotFound(
            f"There is no stored completion '{completion_id}': it was not requested with `store: true`, or was deleted "
            "since.",
            param="completion_id",
        )
    return row


def list_completions(
    session: Session,
    tenant: str | None,
    kind: CompletionKind,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int = 100,
    oldest_first: bool = True,
) -> list[CompletionRecord]:
    """Returns a page of a tenant's stored completions, or of all tenants' (None).

    Args:
        model: only completions of requests with this model.
        metadata: only completions that have all of these pairs.

    Raises:
        NotFound: `after` is not the ID of one of the tenant's completions.
    """
    filters = [CompletionRow.kind == kind]
    filters += [CompletionRow.model == model] if model is not None else []
    filters += [CompletionRow.labels[key].as_string() == value for key, value in (metadata or {}).items()]
    rows = newest_page(session, CompletionRow, tenant, after, limit, filters, oldest_first=oldest_first)
    return [to_record(row) for row in rows]


def set_metadata(
    session: Session, completion_id: str, tenant: str | None, kind: CompletionKind, metadata: Mapping[str, str]
) -> CompletionRecord:
    """Replaces the metadata of a stored completion.

    Raises:
        NotFound: as `get`.
    """
    row = get(session, completion_id, tenant, kind)
    row.labels = dict(metadata)
    session.flush()
    return to_record(row)


def delete(session: Session, completion_id: str, tenant: str | None, kind: CompletionKind) -> CompletionDeletion:
    """Deletes a stored completion with its feedback, and withdraws it from what no nightly run has trained on yet.

    Raises:
        NotFound: as `get`.
    """
    row = get(session, completion_id, tenant, kind)
    return _delete(session, row.tenant, [row.id])


def delete_user(session: Session, tenant: str, user: str) -> CompletionDeletion:
    """Deletes all stored completions of a tenant's user with their feedback, as `delete` does.

    Completions that have ended before, and are not written yet, are not stored by any gateway.
    """
    tenants.lock(session, tenant)  # a gateway that writes now has ended, or waits
    session.merge(DeletedUserRow(digest=_user_digest(tenant, user), tenant=tenant, deleted_at=time.time()))
    statement = select(CompletionRow.id).where(CompletionRow.tenant == tenant, CompletionRow.user == user)
    return _delete(session, tenant, list(session.scalars(statement)))


def expire(session: Session, days: float, *, now: float) -> int:
    """Deletes completions whose retention has ended, with their feedback; returns how many.

    Args:
        days: retention of the tenants that have none of their own.
    """
    own = dict(session.execute(select(TenantRow.name, TenantRow.completion_days)).tuples().all())
    deleted = 0
    for tenant in sorted(session.scalars(select(CompletionRow.tenant).distinct())):
        kept = own.get(tenant)
        before = now - (days if kept is None else kept) * _DAY_SECONDS
        old = (CompletionRow.tenant == tenant) & (CompletionRow.created_at < before)
        result = session.execute(
            delete_from(CompletionRow).where(old), execution_options={"synchronize_session": False}
        )
        deleted += int(result.rowcount)  # type: ignore[attr-defined]  # results of these statements have it
    forgotten = delete_from(DeletedUserRow).where(DeletedUserRow.deleted_at < now - DELETION_DAYS * _DAY_SECONDS)
    session.execute(forgotten, execution_options={"synchronize_session": False})
    session.expire_all()
    return deleted


def to_record(row: CompletionRow) -> CompletionRecord:
    """Returns a row as a value."""
    fields = {name: getattr(row, name) for name in CompletionRecord.model_fields if name != "metadata"}
    return CompletionRecord(metadata=row.labels, **fields)


def _existing(
    session: Session, name: InstrumentedAttribute[str], names: Sequence[str], *conditions: ColumnElement[bool]
) -> set[str]:
    """Returns which of these names exist, and locks their rows against deletion."""
    statement = select(name).where(name.in_(set(names)), *conditions).order_by(name)
    return set(session.scalars(statement.with_for_update(read=True, key_share=True)))


def _deletions(session: Session, records: Sequence[CompletionRecord]) -> dict[str, float]:
    """Returns when the users of these completions were deleted, by digest."""
    digests = {_user_digest(each.tenant, each.user) for each in records if each.user is not None}
    statement = select(DeletedUserRow.digest, DeletedUserRow.deleted_at).where(DeletedUserRow.digest.in_(digests))
    return dict(session.execute(statement).tuples().all())


def _user_digest(tenant: str, user: str) -> str:
    return hashlib.sha256(f"{tenant}/{user}".encode()).hexdigest()


def _delete(session: Session, tenant: str, ids: Sequence[str]) -> CompletionDeletion:
    feedback = session.scalars(select(FeedbackRow).where(FeedbackRow.completion.in_(ids))).all()
    files = withdraw(session, tenant, feedback)
    session.execute(
        delete_from(CompletionRow).where(CompletionRow.id.in_(ids)), execution_options={"synchronize_session": False}
    )
    count = len(feedback)
    session.expire_all()
    return CompletionDeletion(completions=len(ids), feedback=count, files=files)
