"""Datasets: immutable, validated files of a tenant. Their bytes are artifacts of one file each."""

from __future__ import annotations

import secrets
import time

from sqlalchemy.orm import Session

from loramill.errors import NotFound
from loramill.registry import tenants
from loramill.registry.pages import newest
from loramill.registry.tables import DatasetRow
from loramill.types import DatasetRecord


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


def list_of(session: Session, tenant: str | None, after: str | None = None, limit: int = 100) -> list[DatasetRecord]:
    """A page of a tenant's datasets, or of all (None), newest first.

    Raises:
        NotFound: `after` is no id that the tenant has.
    """
    return [DatasetRecord.model_validate(row) for row in newest(session, DatasetRow, tenant, after, limit)]
