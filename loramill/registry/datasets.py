"""Datasets: immutable, validated files of a tenant. Their bytes are artifacts of one file each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from sqlalchemy import delete as delete_from
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from loramill.errors import Conflict, NotFound
from loramill.registry import tenants
from loramill.registry.database.tables import AdapterDataRow, DatasetRow, JobRow, NightlyRunRow
from loramill.registry.pagination import newest_page
from loramill.types import DatasetRecord, JobStatus


def create(session: Session, tenant: str, filename: str, artifact: str, size: int, examples: int) -> DatasetRecord:
    """Records a dataset whose artifact is stored already; `size` in bytes.

    Raises:
        NotFound: there is no such tenant.
    """
    tenants.get(session, tenant)
    row = DatasetRow(
        id=f"file-{secrets.token_hex(12)}",
        tenant=tenant,
        filename=filename,
        artifact=artifact,
        bytes=size,
        examples=examples,
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    return DatasetRecord.model_validate(row)


def get(session: Session, dataset_id: str, tenant: str | None = None) -> DatasetRecord:
    """The dataset of this id, if `tenant` (None: an admin) may see it.

    Raises:
        NotFound: there is none, or it is another tenant's; the message doesn't tell which.
    """
    row = session.get(DatasetRow, dataset_id)
    if row is None or tenant not in (None, row.tenant):
        raise NotFound(f"There is no file '{dataset_id}'.", param="file_id")
    return DatasetRecord.model_validate(row)


def list_datasets(
    session: Session, tenant: str | None, after: str | None = None, limit: int = 100
) -> list[DatasetRecord]:
    """A page of a tenant's datasets, or of all (None), newest first.

    Raises:
        NotFound: `after` is no id that the tenant has.
    """
    return [DatasetRecord.model_validate(row) for row in newest_page(session, DatasetRow, tenant, after, limit)]


def find(session: Session, tenant: str, artifact: str) -> DatasetRecord | None:
    """The tenant's oldest dataset of this content; None if it has none."""
    mine = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.artifact == artifact)
    row = session.scalar(mine.order_by(DatasetRow.created_at, DatasetRow.id).limit(1))
    return None if row is None else DatasetRecord.model_validate(row)


def example_counts(session: Session, dataset_ids: Iterable[str]) -> dict[str, int]:
    """The number of examples of each of these datasets that is still there."""
    statement = select(DatasetRow.id, DatasetRow.examples).where(DatasetRow.id.in_(set(dataset_ids)))
    return dict(session.execute(statement).tuples().all())


def delete(session: Session, dataset_id: str, tenant: str | None = None) -> None:
    """Forgets a dataset; the next sweep removes its bytes, unless another dataset has the same.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: a job that hasn't ended, or the next nightly run, needs it.
    """
    found = get(session, dataset_id, tenant)
    open_states = [status for status in JobStatus if not status.final]
    uses = or_(JobRow.spec["train"].as_string() == dataset_id, JobRow.spec["valid"].as_string() == dataset_id)
    waiting = select(JobRow.id).where(JobRow.tenant == found.tenant, JobRow.status.in_(open_states), uses)
    if (job := session.scalar(waiting.limit(1))) is not None:
        raise Conflict(f"The file '{dataset_id}' can't be deleted: the job {job} needs it until it has ended.")
    given = or_(AdapterDataRow.train == dataset_id, AdapterDataRow.valid == dataset_id)
    past = select(NightlyRunRow.id).where(NightlyRunRow.finished_at.is_not(None))
    needed = select(AdapterDataRow.adapter).where(
        given, or_(AdapterDataRow.run.is_(None), AdapterDataRow.run.not_in(past))
    )
    if (adapter := session.scalar(needed.limit(1))) is not None:
        raise Conflict(
            f"The file '{dataset_id}' can't be deleted: the next nightly run trains {adapter} on it "
            f"(`loramill nightly drop {adapter}` takes its data out)."
        )
    session.execute(delete_from(AdapterDataRow).where(given))
    session.execute(delete_from(DatasetRow).where(DatasetRow.id == dataset_id))
