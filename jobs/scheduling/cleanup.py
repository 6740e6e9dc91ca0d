"""Removes versions and completions that retention does not keep, unused artifacts, and checkpoints of ended jobs.

No Ray.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.registry import Registry
from loramill.registry.database.tables import AdapterRow, JobRow
from loramill.registry.feedback import completions
from loramill.registry.retention.policy import DAY_SECONDS
from loramill.registry.retention.prune import prune
from loramill.settings import COMPLETION_DAYS
from loramill.storage.object_store import open_filesystem, translate_store_errors
from loramill.types import JobStatus, RetentionPolicy

log = logging.getLogger(__name__)

#: Seconds for which an artifact may exist without a record; the upload of a large file takes longest.
ARTIFACT_GRACE_SECONDS = 24 * 3600.0
#: Seconds for which the checkpoints of an ended job are left to its worker, and those of a failed job are kept for
#: inspection, unless `retention.checkpoint_days` is set.
ENDED_JOB_RETENTION_SECONDS, FAILED_JOB_RETENTION_SECONDS = 3600.0, 7 * DAY_SECONDS
_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_DONE = (JobStatus.SUCCEEDED, JobStatus.CANCELLED)


def clean_up(
    registry: Registry,
    checkpoints: Path | str,
    retention: RetentionPolicy,
    *,
    now: float,
    completion_days: float = COMPLETION_DAYS,
) -> int:
    """Removes old versions and stored completions, unused artifacts and checkpoints.

    Args:
        retention: of the adapters that have none of their own.
        completion_days: retention of the stored completions of the tenants that have none of their own.

    Returns:
        How many versions, completions, artifacts and jobs together.

    Raises:
        LoramillError: the database or the artifact store can't be reached.
    """
    with registry.writing(invalidate_caches=False) as session:
        expired = completions.expire(session, completion_days, now=now)
    pruned = expired + len(prune(registry, retention, now=now))
    unreferenced = registry.remove_unreferenced(ARTIFACT_GRACE_SECONDS)
    return pruned + unreferenced + remove_ended_checkpoints(registry, checkpoints, retention, now=now)


def remove_ended_checkpoints(
    registry: Registry, checkpoints: Path | str, retention: RetentionPolicy, *, now: float
) -> int:
    """Removes training states of jobs that ended an hour ago, failed a week ago, or were deleted; returns how many.

    A worker removes its own checkpoints. These are of jobs that were cancelled while they waited, or whose worker
    vanished. Those of failed jobs are removed after the adapter's `checkpoint_days`, where these are set.
    """
    files, root = open_filesystem(str(checkpoints))
    with translate_store_errors(str(checkpoints)):
        if not files.exists(root):
            return 0
        folders = {path.rstrip("/").rpartition("/")[2]: path for path in files.ls(root, detail=False)}
    ended = select(JobRow.id).where(JobRow.status.in_(_DONE), JobRow.finished_at <= now - ENDED_JOB_RETENTION_SECONDS)
    with registry.reading() as session:
        gone = [id_ for id_ in (*session.scalars(ended), *_failed_jobs(session, retention, now)) if id_ in folders]
        # A job is recorded before its first checkpoint is written, and the folders were listed before this query.
        existing = set(session.scalars(select(JobRow.id)))
        gone += [id_ for id_ in folders if _JOB_ID.fullmatch(id_) and id_ not in existing]
    with translate_store_errors(str(checkpoints)):
        for id_ in gone:
            files.rm(folders[id_], recursive=True)
    if gone:
        log.info("removed the checkpoints of %d jobs that ended or were deleted", len(gone))
    return len(gone)


def _failed_jobs(session: Session, retention: RetentionPolicy, now: float) -> list[str]:
    """The failed jobs whose training states are no longer kept."""
    failed = select(JobRow.id, JobRow.finished_at, AdapterRow.retention).outerjoin(
        AdapterRow, AdapterRow.name == JobRow.spec["adapter"].as_string()
    )
    return [
        id_
        for id_, finished_at, own in session.execute(failed.where(JobRow.status == JobStatus.FAILED))
        if finished_at is not None
        and finished_at <= now - _failed_seconds(retention if own is None else RetentionPolicy.model_validate(own))
    ]


def _failed_seconds(retention: RetentionPolicy) -> float:
    days = retention.checkpoint_days
    return FAILED_JOB_RETENTION_SECONDS if days is None else days * DAY_SECONDS


def clean_up_periodically(
    registry: Registry,
    checkpoints: Path | str,
    retention: RetentionPolicy,
    *,
    interval_seconds: float,
    completion_days: float = COMPLETION_DAYS,
) -> None:
    """Cleans up every `interval_seconds`, also after errors."""
    while True:
        try:
            clean_up(registry, checkpoints, retention, now=time.time(), completion_days=completion_days)
        except Exception:  # a database or a disk may be back the next time
            log.exception("clean-up failed; retrying")
        time.sleep(interval_seconds)
