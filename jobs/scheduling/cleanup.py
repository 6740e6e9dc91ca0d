"""Removes artifacts that nothing refers to, and checkpoints of jobs that ended or were deleted. No Ray."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from sqlalchemy import and_, or_, select

from loramill.registry import Registry
from loramill.registry.database.tables import JobRow
from loramill.storage.object_store import open_filesystem, translate_store_errors
from loramill.types import JobStatus

log = logging.getLogger(__name__)

#: Seconds for which an artifact may exist without a record; the upload of a large file takes longest.
ARTIFACT_GRACE_SECONDS = 24 * 3600.0
#: Seconds for which the checkpoints of an ended job are left to its worker, and those of a failed job are kept for
#: inspection.
ENDED_JOB_RETENTION_SECONDS, FAILED_JOB_RETENTION_SECONDS = 3600.0, 7 * 24 * 3600.0
_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_DONE = (JobStatus.SUCCEEDED, JobStatus.CANCELLED)


def clean_up(registry: Registry, checkpoints: Path | str, *, now: float) -> int:
    """Removes unused artifacts and checkpoints; returns the number of artifacts plus the number of jobs.

    Raises:
        LoramillError: the database or the artifact store can't be reached.
    """
    return registry.sweep(ARTIFACT_GRACE_SECONDS) + remove_ended_checkpoints(registry, checkpoints, now=now)


def remove_ended_checkpoints(registry: Registry, checkpoints: Path | str, *, now: float) -> int:
    """Removes checkpoints of jobs that ended an hour ago, failed a week ago, or were deleted; returns how many jobs.

    A worker removes its own checkpoints. These are of jobs that were cancelled while they waited, or whose worker
    vanished.
    """
    files, root = open_filesystem(str(checkpoints))
    with translate_store_errors(str(checkpoints)):
        if not files.exists(root):
            return 0
        folders = {path.rstrip("/").rpartition("/")[2]: path for path in files.ls(root, detail=False)}
    ended = select(JobRow.id).where(
        or_(
            and_(JobRow.status == JobStatus.FAILED, JobRow.finished_at <= now - FAILED_JOB_RETENTION_SECONDS),
            and_(JobRow.status.in_(_DONE), JobRow.finished_at <= now - ENDED_JOB_RETENTION_SECONDS),
        )
    )
    with registry.reading() as session:
        gone = [id_ for id_ in session.scalars(ended) if id_ in folders]
        # A job is recorded before its first checkpoint is written, and the folders were listed before this query.
        existing = set(session.scalars(select(JobRow.id)))
        gone += [id_ for id_ in folders if _JOB_ID.fullmatch(id_) and id_ not in existing]
    with translate_store_errors(str(checkpoints)):
        for id_ in gone:
            files.rm(folders[id_], recursive=True)
    if gone:
        log.info("removed the checkpoints of %d jobs that ended or were deleted", len(gone))
    return len(gone)


def clean_up_periodically(registry: Registry, checkpoints: Path | str, *, interval_seconds: float) -> None:
    """Cleans up every `interval_seconds`, also after errors."""
    while True:
        try:
            clean_up(registry, checkpoints, now=time.time())
        except Exception:  # a database or a disk may be back the next time
            log.exception("clean-up failed; retrying")
        time.sleep(interval_seconds)
