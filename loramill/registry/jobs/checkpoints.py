"""Validated checkpoints of a job: versions that can be used while it trains, before any alias points to them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from loramill.errors import NotFound
from loramill.registry import adapters
from loramill.registry.database.tables import (
    AliasChangeRow,
    AliasRow,
    CheckpointRow,
    EvaluationRow,
    JobRow,
    VersionRow,
)
from loramill.registry.jobs import leases
from loramill.types import CheckpointRecord, JobSpec, VersionRecord

#: Newest checkpoints of a job that keep their versions; older ones keep only their metrics.
MAX_KEPT_VERSIONS = 3


def add(
    session: Session,
    job_id: str,
    attempt: int,
    step: int,
    version: VersionRecord | None,
    metrics: Mapping[str, float],
) -> CheckpointRecord:
    """Records a checkpoint whose artifact is already stored; it replaces an earlier checkpoint of the same step.

    Only the newest `MAX_KEPT_VERSIONS` checkpoints keep their versions; older versions are deleted unless something
    else refers to them.

    Args:
        version: None: the checkpoint cannot be used as a model.

    Raises:
        LeaseLost: another worker has the job, or the job has ended.
    """
    job = leases.lock_held(session, job_id, attempt)
    if version is not None:
        # The adapter may have been renamed since the worker read the job.
        name = JobSpec.model_validate(job.spec).adapter_name
        version = version.model_copy(update={"adapter": str(name)})
        adapters.get_or_create(session, name)
        if session.get(VersionRow, (version.adapter, version.id)) is None:
            session.add(VersionRow(**version.model_dump()))
            session.flush()
    session.execute(delete(CheckpointRow).where(CheckpointRow.job == job_id, CheckpointRow.step == step))
    row = CheckpointRow(
        id=f"ftckpt-{secrets.token_hex(12)}",
        job=job_id,
        step=step,
        version=None if version is None else version.id,
        metrics=dict(metrics),
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    _drop_old_versions(session, job_id)
    return CheckpointRecord.model_validate(row)


def list_checkpoints(
    session: Session, job_id: str, after: str | None = None, limit: int = 10
) -> list[CheckpointRecord]:
    """Returns a page of a job's checkpoints, latest step first.

    Raises:
        NotFound: `after` is not a checkpoint of the job.
    """
    statement = select(CheckpointRow).where(CheckpointRow.job == job_id).order_by(CheckpointRow.step.desc())
    if after is not None:
        last = session.get(CheckpointRow, after)
        if last is None or last.job != job_id:
            raise NotFound(f"There is no '{after}' to list after.", param="after")
        statement = statement.where(CheckpointRow.step < last.step)
    return [CheckpointRecord.model_validate(row) for row in session.scalars(statement.limit(limit))]


def _drop_old_versions(session: Session, job_id: str) -> None:
    of_job = select(CheckpointRow).where(CheckpointRow.job == job_id, CheckpointRow.version.is_not(None))
    for row in session.scalars(of_job.order_by(CheckpointRow.step.desc()).offset(MAX_KEPT_VERSIONS)).all():
        version, row.version = row.version, None
        session.flush()
        _delete_unreferenced_version(session, job_id, str(version))


def _delete_unreferenced_version(session: Session, job_id: str, version: str) -> None:
    """Deletes a version that only a checkpoint of this job refers to; the clean-up deletes its artifact."""
    elsewhere = or_(
        select(JobRow.id).where(JobRow.version == version).exists(),
        select(CheckpointRow.id).where(CheckpointRow.version == version).exists(),
        *(
            select(table.adapter).where(table.adapter == VersionRow.adapter, table.version == version).exists()
            for table in (AliasRow, AliasChangeRow, EvaluationRow)
        ),
    )
    unreferenced = delete(VersionRow).where(VersionRow.id == version, VersionRow.job == job_id, ~elsewhere)
    session.execute(unreferenced, execution_options={"synchronize_session": False})
