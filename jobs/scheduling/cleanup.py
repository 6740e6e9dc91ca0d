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
from loramill.storage.object_store import open_files, store_errors
from loramill.types import JobStatus

log = logging.getLogger(__name__)

#: Seconds for which an artifact may wait to be recorded; an upload of a large file is the longest.
ARTIFACT_SECONDS = 24 * 3600.0
#: Seconds for which an ended job's checkpoints are left to its worker, and those of a failed one to be looked at.
ENDED_SECONDS, FAILED_SECONDS = 3600.0, 7 * 24 * 3600.0
_JOB = re.compile(r"ftjob-[0-9a-f]{24}")
_DONE = (JobStatus.SUCCEEDED, JobStatus.CANCELLED)


def tidy(registry: Registry, checkpoints: Path | str, *, now: float) -> int:
    """Removes what has outlived its use; returns how many artifacts and jobs' checkpoints went.

    Raises:
        LoramillError: the record or the store of artifacts can't be reached.
    """
    return registry.sweep(ARTIFACT_SECONDS) + discard_ended(registry, checkpoints, now=now)


def discard_ended(registry: Registry, checkpoints: Path | str, *, now: float) -> int:
    """Removes checkpoints of jobs that ended an hour ago, failed a week ago, or were deleted. Returns how many jobs.

    A worker removes its own; these are of jobs that were cancelled while they waited, or whose worker vanished.
    """
    files, root = open_files(str(checkpoints))
    with store_errors(str(checkpoints)):
        if not files.exists(root):
            return 0
        places = {path.rstrip("/").rpartition("/")[2]: path for path in files.ls(root, detail=False)}
    ended = select(JobRow.id).where(
        or_(
            and_(JobRow.status == JobStatus.FAILED, JobRow.finished_at <= now - FAILED_SECONDS),
            and_(JobRow.status.in_(_DONE), JobRow.finished_at <= now - ENDED_SECONDS),
        )
    )
    with registry.reading() as session:
        gone = [id_ for id_ in session.scalars(ended) if id_ in places]
        # A job is in the registry before its first checkpoint is written, and these were listed before this is read.
        there = set(session.scalars(select(JobRow.id)))
        gone += [id_ for id_ in places if _JOB.fullmatch(id_) and id_ not in there]
    with store_errors(str(checkpoints)):
        for id_ in gone:
            files.rm(places[id_], recursive=True)
    if gone:
        log.info("removed the checkpoints of %d jobs that have ended or were deleted", len(gone))
    return len(gone)


def tidy_for_ever(registry: Registry, checkpoints: Path | str, *, every: float) -> None:
    """Tidies `every` so many seconds, whatever happens."""
    while True:
        try:
            tidy(registry, checkpoints, now=time.time())
        except Exception:  # a database or a disk that is away is back one day
            log.exception("could not tidy up; trying again")
        time.sleep(every)
