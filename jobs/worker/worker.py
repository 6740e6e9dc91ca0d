"""A worker leases one job after another, trains it on a resident base model and publishes its version. No Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loramill.data.encoding import TrainingExample, encode_for_training
from loramill.data.examples import Example, Examples, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import (
    AdapterInvalid,
    ArtifactError,
    BaseUnusable,
    InvalidRequest,
    JobCancelled,
    JobError,
    JobPaused,
    JobPreempted,
    LeaseLost,
    LoramillError,
    NotFound,
    StoreUnusable,
    Unavailable,
)
from loramill.jobs.train.batching import count_supervised_tokens, sequences
from loramill.jobs.train.checkpoint_store import delete_all
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup
from loramill.jobs.train.loop import TrainContext, TrainingProgress, train
from loramill.jobs.worker import publish
from loramill.jobs.worker.lease import Lease, outlast_database_outage
from loramill.jobs.worker.loggers import open_loggers
from loramill.kernels.device import device_works, free_cached_memory
from loramill.models.catalog import Base
from loramill.registry import Registry, datasets, jobs
from loramill.settings import JobSettings
from loramill.types import Executor, JobRecord

log = logging.getLogger(__name__)

#: Errors that another attempt would meet again: bad or unreadable data, a spec that fits nothing, divergence.
PERMANENT_ERRORS = (InvalidRequest, NotFound, AdapterInvalid, BaseUnusable, ArtifactError, JobError)

#: Outages, which no job causes and which end for all jobs at once: a store or database that is away, or a store that
#: refuses access, for example since its credentials have expired. They cost no attempt.
OUTAGE_ERRORS = (Unavailable, StoreUnusable)

#: Seconds between two queries of an empty queue.
POLL_SECONDS = 0.25
#: Seconds of pause after an outage; they double with each further job that ends in one, up to the maximum.
OUTAGE_PAUSE_SECONDS, MAX_OUTAGE_PAUSE_SECONDS = 3.0, 60.0


@dataclass(frozen=True, slots=True)
class Worker:
    """Everything that a worker keeps from job to job.

    Attributes:
        name: identifies the worker in the registry.
        model: returns the resident base model on `device`, the same one at each call; a full fine-tune loads its own.
        checkpoints: folder or fsspec URL that all of the pool's machines can access.
        logs: folder of TensorBoard's runs, if the settings enable TensorBoard.
        executor: executor whose jobs it leases; None for any.
        process_group: processes that share each job's passes; only the first leases, reports and publishes.
    """

    name: str
    registry: Registry
    base: Base
    model: Callable[[], PreTrainedModel]
    device: torch.device
    tokenizer: ChatTokenizer
    checkpoints: Path | str
    logs: Path
    settings: JobSettings
    executor: Executor | None = None
    process_group: ProcessGroup = SINGLE_PROCESS

    def checkpoint_location(self, job: JobRecord) -> Path | str:
        """Folder or URL of the job's checkpoints."""
        return f"{self.checkpoints}/{job.id}" if isinstance(self.checkpoints, str) else self.checkpoints / job.id


def run_jobs(worker: Worker, *, should_stop: Callable[[float], bool]) -> int:
    """Runs one job after another, and returns how many.

    Args:
        should_stop: called between jobs with the seconds since the last one ended.

    Raises:
        Unavailable: a job left the GPU unusable for this process; other jobs would only fail.
    """
    done, idle_since, settle_from, pause = 0, time.monotonic(), 0.0, OUTAGE_PAUSE_SECONDS
    while True:
        try:
            if should_stop(time.monotonic() - idle_since):
                return done
            job = lease_next_job(worker, settle=time.monotonic() >= settle_from)
        except LoramillError as error:
            log.warning("no job could be leased; retrying: %s", error.message)
            # During the outage workers that hold a job could not send heartbeats: they get time to do it first.
            settle_from = time.monotonic() + OUTAGE_PAUSE_SECONDS + worker.settings.lease_seconds
            time.sleep(OUTAGE_PAUSE_SECONDS)
            continue
        if job is None:
            time.sleep(POLL_SECONDS)
            continue
        error_of_attempt = run_attempt(worker, job)
        if error_of_attempt is not None and not device_works(worker.device):
            raise Unavailable("The GPU of this session does not compute any more; the session is being replaced.")
        free_cached_memory(worker.device)  # the next job's tensors have other sizes
        done, idle_since = done + 1, time.monotonic()
        if isinstance(error_of_attempt, OUTAGE_ERRORS):
            time.sleep(pause)
            pause = min(2 * pause, MAX_OUTAGE_PAUSE_SECONDS)
        else:
            pause = OUTAGE_PAUSE_SECONDS


def run_next_job(worker: Worker) -> bool:
    """Leases a job and runs one attempt of it; returns False if no job waits."""
    job = lease_next_job(worker)
    if job is None:
        return False
    run_attempt(worker, job)
    return True


def lease_next_job(worker: Worker, job_id: str | None = None, *, settle: bool = True) -> JobRecord | None:
    """Leases the next job, or the one with this id; returns None if it does not wait or is for another base.

    Args:
        settle: first queue again the jobs whose workers vanished.

    Raises:
        Unavailable, DiskFull, DatabaseUnusable: the database can't be used.
    """
    settings = worker.settings
    with worker.registry.writing() as session:
        return jobs.lease(
            session,
            worker.name,
            now=time.time(),
            seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            executor=worker.executor,
            job_id=job_id,
            base=worker.base.fingerprint,
            reclaim=settle,
        )


def run_attempt(worker: Worker, job: JobRecord) -> LoramillError | None:
    """Runs one attempt of a leased job; returns the error that ended it early, if any.

    The registry has the outcome. If the registry can't be reached, the lease runs out, and another attempt follows.
    """
    log.info("job %s of %s: attempt %d", job.id, job.tenant, job.attempt)
    try:
        with Lease(worker.registry, job, worker.settings) as lease:
            run_job(worker, job, lease)
    except LeaseLost as error:
        log.warning("job %s: the lease was lost; another worker has the job", job.id)
        return error
    except LoramillError as error:
        record_attempt_end(worker, job, error)
        return error
    except Exception as error:  # a job must not end its session
        log.exception("job %s: failed", job.id)
        failed = LoramillError(f"{type(error).__name__}: {error}")
        record_attempt_end(worker, job, failed)
        return failed
    return None


def run_job(worker: Worker, job: JobRecord, lease: Lease) -> None:
    """Trains `job` from its last checkpoint, or from the start, and publishes its version.

    Raises:
        LoramillError: the job can't succeed (bad data, divergence, another base) or has to stop.
        LeaseLost: another worker has the job.
    """
    loggers = open_loggers(worker.settings.loggers, run=job.id, spec=job.spec, folder=worker.logs)
    try:
        with loggers as log_progress, closing(training_steps(worker, job, lease.raise_if_stopped)) as steps:
            for progress in steps:
                lease.report(progress)
                log_progress(progress)
                if progress.valid_loss is not None:
                    publish.checkpoint(worker, job, progress)
    finally:
        lease.flush()
    publish.version(worker, job, lease.last_progress)
    remove_checkpoints(worker, job)


def training_steps(
    worker: Worker, job: JobRecord, raise_if_stopped: Callable[[], None]
) -> Generator[TrainingProgress, None, None]:
    """Returns a generator that takes one of the job's steps at each iteration.

    Raises:
        BaseUnusable: the job is for another base.
        NotFound, ArtifactError: its data can't be read.
        LoramillError: as `train`.
    """
    spec, registry = job.spec, worker.registry
    if spec.base != worker.base.fingerprint:
        raise BaseUnusable(
            f"The job was submitted for the base {spec.base[:12]}, and this pool serves {worker.base.fingerprint[:12]} "
            f"('{worker.base.name}'): submit it again."
        )
    examples = read_dataset(worker, job, spec.train)
    context = TrainContext(
        spec=spec,
        train_examples=encode_examples(worker, job, examples),
        valid_examples=encode_examples(worker, job, read_dataset(worker, job, spec.valid)) if spec.valid else [],
        base_folder=worker.base.folder,
        checkpoints=worker.checkpoint_location(job),
        start_from=registry.artifacts.fetch(spec.start_from) if spec.start_from else None,
        raise_if_stopped=raise_if_stopped,
        micro_tokens=job.micro_tokens,
        process_group=worker.process_group,
        deterministic=worker.settings.deterministic,
    )
    if worker.process_group.rank == 0:
        report_supervised_tokens(worker, job, examples.examples, context.train_examples)
    if spec.method == "full":
        from loramill.jobs.train.full_finetune import train_full  # imports DeepSpeed, which nothing else needs

        return train_full(worker.base, context, device=worker.device)
    return train(worker.model(), context)


def read_dataset(worker: Worker, job: JobRecord, dataset: str) -> Examples:
    """Reads a dataset of the job's tenant."""
    with worker.registry.reading() as session:
        record = datasets.get(session, dataset, tenant=job.tenant)
    return read_examples(worker.registry.artifacts.read(record.artifact, "data.jsonl"), record.filename)


def encode_examples(worker: Worker, job: JobRecord, examples: Examples) -> list[TrainingExample]:
    """Encodes examples. A template that writes the date gets the job's submission date, so that every attempt trains
    on the same tokens."""
    tokenizer = worker.tokenizer.at_time(datetime.fromtimestamp(job.created_at, UTC))
    return [encode_for_training(tokenizer, example, job.spec.train_on) for example in examples.examples]


def report_supervised_tokens(
    worker: Worker, job: JobRecord, examples: Sequence[Example], encoded: Sequence[TrainingExample]
) -> None:
    """Adds one event to the job's history: how many answers and tokens of the training file are supervised."""
    parts = sequences(encoded)
    counts = {
        "examples": len(examples),
        "answers": sum(
            len(side.answers) if side.prompt is None else 1 for example in examples for side in example.sides
        ),
        "trained_answers": sum(len(part.spans) for part in parts),
        "supervised_tokens": sum(map(count_supervised_tokens, parts)),
    }
    message = (
        "Training on {trained_answers} of {answers} answers in {examples} examples: {supervised_tokens} supervised "
        "tokens per epoch."
    )
    with worker.registry.writing() as session:
        if not any("supervised_tokens" in event.data for event in jobs.list_events(session, job.id)):
            jobs.add_event(session, job.id, message.format(**counts), data=counts)


def record_attempt_end(worker: Worker, job: JobRecord, error: LoramillError) -> None:
    """Records the error that ended an attempt; the job is queued again if it is to continue or a retry may help."""
    settings = worker.settings
    if isinstance(error, JobCancelled):
        remove_checkpoints(worker, job)  # before it may be retried

    def end_attempt() -> None:
        with worker.registry.writing() as session:
            if isinstance(error, JobPaused | JobPreempted | JobCancelled):
                jobs.release(session, job.id, job.attempt)
            elif isinstance(error, OUTAGE_ERRORS):
                jobs.release(session, job.id, job.attempt, error=error, backoff_seconds=settings.backoff_seconds)
            else:
                jobs.fail(
                    session,
                    job.id,
                    job.attempt,
                    error,
                    retry=not isinstance(error, PERMANENT_ERRORS),
                    backoff_seconds=settings.backoff_seconds,
                )

    try:
        outlast_database_outage(end_attempt)
    except LeaseLost:
        log.warning("job %s: ended, but the lease had been lost before: %s", job.id, error)
    except LoramillError:
        log.exception("job %s: ended (%s), and the registry can't be reached; the lease will run out", job.id, error)


def remove_checkpoints(worker: Worker, job: JobRecord) -> None:
    """Removes a job's checkpoints; what can't be removed now is left to the next clean-up."""
    try:
        delete_all(worker.checkpoint_location(job))
    except (LoramillError, OSError) as error:
        log.warning("job %s: the checkpoints can't be removed now: %s", job.id, error)
