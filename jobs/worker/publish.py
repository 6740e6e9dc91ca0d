"""What a worker stores of a job: the artifact first, then its record, so that a crash between leaves only garbage."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loramill.jobs.train.loop import TrainingProgress, export_adapter
from loramill.jobs.worker.lease import DATABASE_OUTAGE_SECONDS, retry_while_unavailable
from loramill.registry import adapters, jobs
from loramill.registry.jobs import checkpoints
from loramill.types import JobRecord, VersionRecord

if TYPE_CHECKING:
    from loramill.jobs.worker.worker import Worker

log = logging.getLogger(__name__)


def checkpoint(worker: Worker, job: JobRecord, point: TrainingProgress) -> None:
    """Publishes the last checkpoint as a version that can be asked, without moving an alias.

    Raises:
        LeaseLost: the job is another worker's.
        DiskFull, Unavailable, StoreUnusable: it can't be stored.
    """
    stored = None
    if job.spec.method != "full":  # its LoRA would have to be extracted each time
        stored = _store(
            worker, job, export_adapter(worker.checkpoint_location(job), job.spec, base=worker.base.name, best=False)
        )

    def add() -> None:
        with worker.registry.writing() as session:
            checkpoints.add(session, job.id, job.attempt, point.step, stored, point.metrics)

    retry_while_unavailable(DATABASE_OUTAGE_SECONDS, add)


def version(worker: Worker, job: JobRecord, last: TrainingProgress | None) -> None:
    """Publishes the trained adapter as the job's version, which ends the job.

    Args:
        last: the last step of this attempt; None: all steps were done before.

    Raises:
        LeaseLost, JobCancelled: the job is not this worker's, or not wanted any more.
        DiskFull, Unavailable, StoreUnusable: it can't be stored.
    """
    spec, place, result = job.spec, worker.checkpoint_location(job), None
    if spec.method == "full":
        from loramill.jobs.train.full_finetune import export_full

        with TemporaryDirectory() as folder:
            full = export_full(place, spec, base=worker.base, folder=Path(folder))
            files, result = full.adapter_files, worker.registry.artifacts.put(full.model_files)
    else:
        files = export_adapter(place, spec, base=worker.base.name)
    found = _store(worker, job, files)

    def publish() -> None:
        with worker.registry.writing() as session:
            published = jobs.publish(
                session,
                job.id,
                job.attempt,
                found,
                step=None if last is None else last.step,
                trained_tokens=None if last is None else last.trained_tokens,
                result=result,
            )
            name = published.spec.adapter_name  # may have changed since the job was leased
            champion = adapters.get(session, name).champion
        log.info("job %s: published %s, champion %s", job.id, name.at(found.id), champion)

    retry_while_unavailable(DATABASE_OUTAGE_SECONDS, publish)


def _store(worker: Worker, job: JobRecord, files: Mapping[str, bytes]) -> VersionRecord:
    spec, artifacts = job.spec, worker.registry.artifacts
    origin = {"job": job.id, "adapter": spec.adapter, "base": spec.base, "spec": spec.model_dump(mode="json")}
    stored = artifacts.put({**files, "loramill.json": json.dumps(origin, indent=1, sort_keys=True).encode()})
    return VersionRecord(
        id=stored,
        adapter=spec.adapter,
        job=job.id,
        base=spec.base,
        bytes=artifacts.size(stored),
        created_at=time.time(),
    )
