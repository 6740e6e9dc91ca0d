"""Publishes a job's versions: stores the artifact, then records it, so that a crash leaves no record without files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.worker.lease import outlast_database_outage
from loramill.registry import adapters, jobs
from loramill.registry.jobs import checkpoints
from loramill.types import JobRecord, VersionRecord

if TYPE_CHECKING:
    from loramill.jobs.worker.worker import Worker

log = logging.getLogger(__name__)


def checkpoint(worker: Worker, job: JobRecord, progress: TrainingProgress) -> None:
    """Publishes the last checkpoint as a version that can be used by its name; no alias moves.

    Raises:
        LeaseLost: another worker has the job.
        DiskFull, Unavailable, StoreUnusable: the version can't be stored.
    """
    artifact = None
    if job.spec.method != "full":  # a LoRA would have to be extracted for each checkpoint
        location = worker.checkpoint_location(job)
        artifact = _store(worker, job, export_adapter(location, job.spec, base=worker.base.name, best=False))

    def add() -> None:
        with worker.registry.writing() as session:
            checkpoints.add(session, job.id, job.attempt, progress.step, artifact, progress.metrics)

    outlast_database_outage(add)


def version(worker: Worker, job: JobRecord, last: TrainingProgress | None, location: Path | str | None = None) -> None:
    """Publishes the trained adapter as the job's version, which ends the job.

    Args:
        last: the last step of this attempt, or None if an earlier attempt did all steps.
        location: of the checkpoints, if it is not the job's.

    Raises:
        LeaseLost: another worker has the job.
        JobCancelled: the job was cancelled.
        DiskFull, Unavailable, StoreUnusable: the version can't be stored.
    """
    spec, location, result = job.spec, location or worker.checkpoint_location(job), None
    if spec.method == "full":
        from loramill.jobs.train.full_finetune import export_full

        with TemporaryDirectory() as folder:
            full = export_full(location, spec, base=worker.base, folder=Path(folder))
            files, result = full.adapter_files, worker.registry.artifacts.put(full.model_files)
    else:
        files = export_adapter(location, spec, base=worker.base.name)
    new_version = _store(worker, job, files)

    def publish() -> None:
        with worker.registry.writing() as session:
            published = jobs.publish(
                session,
                job.id,
                job.attempt,
                new_version,
                step=None if last is None else last.step,
                trained_tokens=None if last is None else last.trained_tokens,
                result=result,
            )
            name = published.spec.adapter_name  # may have changed since the job was leased
            champion = adapters.get(session, name).champion
        log.info("job %s: published %s, champion %s", job.id, name.at(new_version.id), champion)

    outlast_database_outage(publish)


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
