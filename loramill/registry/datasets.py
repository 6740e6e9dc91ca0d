"""Datasets: immutable, validated files of a tenant, each stored as an artifact of one file."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from sqlalchemy import delete as delete_from
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from loramill.errors import Conflict, NotFound
from loramill.registry import content, tenants
from loramill.registry.database.tables import AdapterDataRow, DatasetRow, JobRow, NightlyRunRow
from loramill.registry.pagination import newest_page
from loramill.types import DatasetRecord, JobStatus


def create(session: Session, tenant: str, filename: str, artifact: str, size: int, examples: int) -> DatasetRecord:
    """Records a dataset whose artifact is already stored; `size` is in bytes.

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
    """Returns the dataset with this ID.

    Args:
        tenant: only a dataset of this tenant; None: an admin, who sees all datasets.

    Raises:
        NotFound: there is no such dataset, or it is another tenant's; the message is the same.
    """
    row = session.get(DatasetRow, dataset_id)
    if row is None or tenant not in (None, row.tenant):
        raise NotFound(f"There is no file '{dataset_id}'.", param="file_id")
    return DatasetRecord.model_validate(row)


def list_datasets(
    session: Session, tenant: str | None, after: str | None = None, limit: int = 100
) -> list[DatasetRecord]:
    """Returns a page of a tenant's datasets, or of all datasets (None), newest first.

    Raises:
        NotFound: `after` is not the ID of a dataset of the tenant.
    """
    return [DatasetRecord.model_validate(row) for row in newest_page(session, DatasetRow, tenant, after, limit)]


def find(session: Session, tenant: str, artifact: str) -> DatasetRecord | None:
    """Returns the tenant's oldest dataset with this content; None if there is none."""
    statement = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.artifact == artifact)
    row = session.scalar(statement.order_by(DatasetRow.created_at, DatasetRow.id).limit(1))
    return None if row is None else DatasetRecord.model_validate(row)


def example_counts(session: Session, dataset_ids: Iterable[str]) -> dict[str, int]:
    """Returns the number of examples of each of these datasets that still exists."""
    statement = select(DatasetRow.id, DatasetRow.examples).where(DatasetRow.id.in_(set(dataset_ids)))
    return dict(session.execute(statement).tuples().all())


def delete(session: Session, dataset_id: str, tenant: str | None = None) -> None:
    """Deletes a dataset; the next clean-up deletes its content, unless another dataset has the same content.

    Raises:
        NotFound: there is no such dataset, or it is another tenant's.
        Conflict: a job that has not ended, or the next nightly run, needs it.
    """
    found = get(session, dataset_id, tenant)
    open_states = [status for status in JobStatus if not status.final]
    uses = or_(JobRow.spec["train"].as_string() == dataset_id, JobRow.spec["valid"].as_string() == dataset_id)
    open_jobs = select(JobRow.id).where(JobRow.tenant == found.tenant, JobRow.status.in_(open_states), uses)
    if (job := session.scalar(open_jobs.limit(1))) is not None:
        raise Conflict(f"The file '{dataset_id}' cannot be deleted: the job {job} needs it until it has ended.")
    refers = or_(AdapterDataRow.train == dataset_id, AdapterDataRow.valid == dataset_id)
    ended = select(NightlyRunRow.id).where(NightlyRunRow.finished_at.is_not(None))
    needed = select(AdapterDataRow.adapter).where(
        refers, or_(AdapterDataRow.run.is_(None), AdapterDataRow.run.not_in(ended))
    )
    if (adapter := session.scalar(needed.limit(1))) is not None:
        raise Conflict(
            f"The file '{dataset_id}' cannot be deleted: the next nightly run trains {adapter} on it "
            f"(`loramill nightly drop {adapter}` removes the adapter's data from it)."
        )
    session.execute(delete_from(AdapterDataRow).where(refers))
    content.forget_sketches(session, dataset_id)
    session.execute(delete_from(DatasetRow).where(DatasetRow.id == dataset_id))
