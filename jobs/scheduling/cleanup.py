"""Removes artifacts that nothing refers to, and checkpoints of jobs that have ended or were deleted.

No Ray.
"""

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

#: Seconds for which an artifact may wait to be recorded; an upload of a large file is the longest.
ARTIFACT_GRACE_SECONDS = 24 * 3600.0
#: Seconds for which an ended job's checkpoints are left to its worker, and those of a failed one to be looked at.
ENDED_JOB_RETENTION_SECONDS, FAILED_JOB_RETENTION_SECONDS = 3600.0, 7 * 24 * 3600.0
_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_DONE = (JobStatus.SUCCEEDED, JobStatus.CANCELLED)


def clean_up(registry: Registry, checkpoints: Path | str, *, now: float) -> int:
    """Removes what has outlived its use; returns how many artifacts and jobs' checkpoints went.

    Raises:
        LoramillError: the record or the store of artifacts can't be reached.
    """
    return registry.sweep(ARTIFACT_GRACE_SECONDS) + remove_ended_checkpoints(registry, checkpoints, now=now)


def remove_ended_checkpoints(registry: Registry, checkpoints: Path | str, *, now: float) -> int:
    """Removes checkpoints of jobs that ended an hour ago, failed a week ago, or were deleted. Returns how many jobs.

    A worker removes its own; these are of jobs that were cancelled while they waited, or whose worker vanished.
    """
    files, root = open_filesystem(str(checkpoints))
    with translate_store_errors(str(checkpoints)):
        if not files.exists(root):
            return 0
        places = {path.rstrip("/").rpartition("/")[2]: path for path in files.ls(root, detail=False)}
    ended = select(JobRow.id).where(
        or_(
            and_(JobRow.status == JobStatus.FAILED, JobRow.finished_at <= now - FAILED_JOB_RETENTION_SECONDS),
            and_(JobRow.status.in_(_DONE), JobRow.finished_at <= now - ENDED_JOB_RETENTION_SECONDS),
        )
    )
    with registry.reading() as session:
        gone = [id_ for id_ in session.scalars(ended) if id_ in places]
        # A job is in the registry before its first checkpoint is written, and these were listed before this is read.
        there = set(session.scalars(select(JobRow.id)))
        gone += [id_ for id_ in places if _JOB_ID.fullmatch(id_) and id_ not in there]
    with translate_store_errors(str(checkpoints)):
        for id_ in gone:
            files.rm(places[id_], recursive=True)
    if gone:
        log.info("removed the checkpoints of %d jobs that have ended or were deleted", len(gone))
    return len(gone)


def clean_up_periodically(registry: Registry, checkpoints: Path | str, *, interval_seconds: float) -> None:
    """Tidies `every` so many seconds, whatever happens."""
    while True:
        try:
            clean_up(registry, checkpoints, now=time.time())
        except Exception:  # a database or a disk that is away is back one day
            log.exception("could not tidy up; trying again")
        time.sleep(interval_seconds)
