"""A worker: leases one job after another, trains it on a resident base, and publishes its version. No Ray."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from loramill.bases import Base
from loramill.chat import ChatTokenizer, EncodedExample
from loramill.dataset import read_examples
from loramill.errors import (
    AdapterInvalid,
    BaseUnusable,
    InvalidRequest,
    JobCancelled,
    JobError,
    LeaseLost,
    LoramillError,
    NotFound,
)
from loramill.jobs.training import Progress, export, train
from loramill.registry import Registry, adapters, datasets, jobs
from loramill.settings import JobSettings
from loramill.types import JobRecord, VersionRecord

log = logging.getLogger(__name__)

#: A job's history keeps at most about this many metrics events, whatever its number of steps.
METRICS_EVENTS = 200

#: What another attempt would meet again: bad data, a spec that fits nothing, divergence, a cancelled job.
PERMANENT = (InvalidRequest, NotFound, AdapterInvalid, BaseUnusable, JobError)


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker needs, all of it kept from job to job; `owner` names it in the record."""

    owner: str
    registry: Registry
    base: Base
    model: PreTrainedModel
    tokenizer: ChatTokenizer
    checkpoints: Path
    settings: JobSettings


def work(worker: Worker, *, until: Callable[[float], bool]) -> int:
    """Runs jobs as long as there are any; returns how many. `until(idle)` says, between jobs, whether to end."""
    done, idle_since = 0, time.monotonic()
    while not until(time.monotonic() - idle_since):
        if run_next(worker):
            done, idle_since = done + 1, time.monotonic()
        else:
            time.sleep(0.5)
    return done


def run_next(worker: Worker) -> bool:
    """Leases a job and takes it to its end, or to the point where it is another's; False if none waits."""
    settings = worker.settings
    with worker.registry.writing() as session:
        job = jobs.lease(
            session, worker.owner, now=time.time(), seconds=settings.lease_seconds, max_attempts=settings.max_attempts
        )
    if job is None:
        return False
    log.info("job %s of %s: attempt %d", job.id, job.tenant, job.attempt)
    try:
        with Lease(worker, job) as lease:
            run_job(worker, job, lease)
    except LeaseLost:
        log.warning("job %s: the lease was lost; another worker has it", job.id)
    except PERMANENT as error:
        give_up(worker, job, error, retry=False)
    except LoramillError as error:
        give_up(worker, job, error, retry=True)
    except Exception as error:  # a job must not take its session down with it
        log.exception("job %s: failed", job.id)
        give_up(worker, job, LoramillError(f"{type(error).__name__}: {error}"), retry=True)
    return True


class Lease:
    """Keeps a job's lease alive from a thread of its own, and tells the training when it is over."""

    def __init__(self, worker: Worker, job: JobRecord) -> None:
        self._worker, self._job = worker, job
        self._step, self._tokens = job.step, job.trained_tokens
        self._ended = threading.Event()
        self._error: LoramillError | None = None
        self._thread = threading.Thread(target=self._beat_until_end, name=f"lease {job.id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self, step: int, tokens: int) -> None:
        """Notes how far the job is.

        Raises:
            LeaseLost, JobCancelled: the job is not this worker's any more.
        """
        self._step, self._tokens = step, tokens
        if self._error is not None:
            raise self._error

    def _beat_until_end(self) -> None:
        settings = self._worker.settings
        while not self._ended.wait(min(1.0, settings.lease_seconds / 4)):
            try:
                with self._worker.registry.writing() as session:
                    jobs.heartbeat(
                        session,
                        self._job.id,
                        self._job.attempt,
                        now=time.time(),
                        seconds=settings.lease_seconds,
                        step=self._step,
                        trained_tokens=self._tokens,
                    )
            except (LeaseLost, JobCancelled) as error:
                self._error = error
                return
            except LoramillError:
                log.exception("job %s: the heartbeat did not reach the record; trying again", self._job.id)


def run_job(worker: Worker, job: JobRecord, lease: Lease) -> None:
    """Trains `job` from its last checkpoint, or from the start, and publishes the version.

    Raises:
        LoramillError: the job can't succeed (bad data, divergence, another base), or isn't this worker's any more.
    """
    spec, registry = job.spec, worker.registry
    if spec.base != worker.base.fingerprint:
        raise BaseUnusable(
            f"The job was submitted for the base {spec.base[:12]}, and this pool serves {worker.base.fingerprint[:12]} "
            f"('{worker.base.name}'): submit it again."
        )
    checkpoints = worker.checkpoints / job.id
    progress = train(
        worker.model,
        encoded(worker, job.tenant, spec.train),
        encoded(worker, job.tenant, spec.valid) if spec.valid else [],
        spec,
        checkpoints=checkpoints,
        start_from=registry.artifacts.fetch(spec.start_from) if spec.start_from else None,
    )
    with closing(progress):
        for point in progress:
            lease.progress(point.step, point.tokens)
            record(worker, job, point)
    publish(worker, job, checkpoints)
    shutil.rmtree(checkpoints)


def encoded(worker: Worker, tenant: str, dataset: str) -> list[EncodedExample]:
    """The tokens of a dataset of the tenant."""
    with worker.registry.reading() as session:
        found = datasets.get(session, dataset, tenant=tenant)
    examples = read_examples(worker.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename)
    return [worker.tokenizer.example(example) for example in examples.examples]


def record(worker: Worker, job: JobRecord, point: Progress) -> None:
    """Writes a metrics event, at most `METRICS_EVENTS` a job and always where the validation loss is known."""
    every = max(1, point.steps // METRICS_EVENTS)
    if point.step % every and point.step != point.steps and point.valid_loss is None:
        return
    data = {
        "step": point.step,
        "total_steps": point.steps,
        "train_loss": point.loss,
        "learning_rate": point.learning_rate,
        "grad_norm": point.grad_norm,
        "trained_tokens": point.tokens,
    }
    if point.valid_loss is not None:
        data["valid_loss"] = point.valid_loss
    message = f"Step {point.step}/{point.steps}: training loss={point.loss:.3f}"
    with worker.registry.writing() as session:
        jobs.add_event(session, job.id, "info", "metrics", message, data)


def publish(worker: Worker, job: JobRecord, checkpoints: Path) -> None:
    """Stores the trained adapter, then records it as a version: a crash between the two leaves only garbage."""
    spec, artifacts = job.spec, worker.registry.artifacts
    files = export(checkpoints, spec, base=worker.base.name)
    origin = {"job": job.id, "adapter": spec.adapter, "base": spec.base, "spec": spec.model_dump(mode="json")}
    version = artifacts.put({**files, "loramill.json": json.dumps(origin, indent=1, sort_keys=True).encode()})
    found = VersionRecord(
        id=version,
        adapter=spec.adapter,
        job=job.id,
        base=spec.base,
        bytes=artifacts.size(version),
        created_at=time.time(),
    )
    with worker.registry.writing() as session:
        jobs.publish(session, job.id, job.attempt, found)
        pointing = adapters.get(session, spec.adapter_name)
    log.info("job %s: published %s, champion %s", job.id, spec.adapter_name.at(version), pointing.champion)


def give_up(worker: Worker, job: JobRecord, error: LoramillError, *, retry: bool) -> None:
    """Records why an attempt failed; the job is queued again if that may help."""
    try:
        with worker.registry.writing() as session:
            jobs.fail(session, job.id, job.attempt, error, retry=retry)
    except LeaseLost:
        log.warning("job %s: failed, but the lease was lost before: %s", job.id, error)
