"""A worker leases a job, trains it on a resident base model and publishes its version. No Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loramill.data.encoding import TrainingExample, encode_all
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
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup
from loramill.jobs.train.loop import train
from loramill.jobs.worker import publish
from loramill.jobs.worker.lease import Lease, outlast_database_outage
from loramill.jobs.worker.loggers import open_loggers
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


def run_next_job(worker: Worker) -> bool:
    """Leases a job and runs one attempt of it; returns False if no job waits."""
    job = lease_next_job(worker)
    if job is None:
        return False
    run_attempt(worker, job)
    return True


def lease_next_job(
    worker: Worker,
    job_id: str | None = None,
    *,
    settle: bool = True,
    admits: Callable[[JobRecord], bool] | None = None,
) -> JobRecord | None:
    """Leases the next job, or the one with this id; returns None if it does not wait or is for another base.

    Args:
        admits: whether the worker has room for a job; None: for any.
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
            admits=admits,
        )


@dataclass(slots=True)
class Attempt:
    """One attempt of a leased job; `error` ended it early, if any."""

    lease: Lease
    error: LoramillError | None = None


@contextmanager
def recorded_attempt(worker: Worker, job: JobRecord) -> Iterator[Attempt]:
    """Keeps a job's lease, and records an error of the body as the attempt's end instead of raising it.

    The registry has the outcome. If the registry can't be reached, the lease runs out, and another attempt follows.
    """
    log.info("job %s of %s: attempt %d", job.id, job.tenant, job.attempt)
    attempt = Attempt(Lease(worker.registry, job, worker.settings))
    try:
        with attempt.lease:
            yield attempt
    except LeaseLost as error:
        log.warning("job %s: the lease was lost; another worker has the job", job.id)
        attempt.error = error
    except LoramillError as error:
        attempt.error = error
        record_attempt_end(worker, job, error)
    except Exception as error:  # a job must not end its session
        log.exception("job %s: failed", job.id)
        attempt.error = LoramillError(f"{type(error).__name__}: {error}")
        record_attempt_end(worker, job, attempt.error)


def run_attempt(worker: Worker, job: JobRecord) -> LoramillError | None:
    """Runs one attempt of a leased job alone; returns the error that ended it early, if any."""
    with recorded_attempt(worker, job) as attempt:
        run_job(worker, job, attempt.lease)
    return attempt.error


def run_job(worker: Worker, job: JobRecord, lease: Lease) -> None:
    """Trains `job` from its last checkpoint, or from the start, and publishes its version.

    Raises:
        LoramillError: the job can't succeed (bad data, divergence, another base) or has to stop.
        LeaseLost: another worker has the job.
    """
    with (
        reported_steps(worker, job, lease) as report,
        closing(training_steps(worker, job, lease.raise_if_stopped)) as steps,
    ):
        for progress in steps:
            report(progress)
            if progress.valid_loss is not None:
                publish.checkpoint(worker, job, progress)
    publish.version(worker, job, lease.last_progress)
    remove_checkpoints(worker, job)


@contextmanager
def reported_steps(worker: Worker, job: JobRecord, lease: Lease) -> Iterator[Callable[[TrainingProgress], None]]:
    """Within, the yielded function reports a step to the registry and the loggers."""
    loggers = open_loggers(worker.settings.loggers, run=job.id, spec=job.spec, folder=worker.logs)

    def report(progress: TrainingProgress) -> None:
        lease.report(progress)
        log_progress(progress)

    try:
        with loggers as log_progress:
            yield report
    finally:
        lease.flush()


def training_steps(
    worker: Worker, job: JobRecord, raise_if_stopped: Callable[[], None]
) -> Generator[TrainingProgress, None, None]:
    """Returns a generator that takes one of the job's steps at each iteration.

    Raises:
        LoramillError: as `training_context` and `train`.
    """
    context = training_context(worker, job, raise_if_stopped)
    if job.spec.method == "full":
        from loramill.jobs.train.full_finetune import train_full  # imports DeepSpeed, which nothing else needs

        return train_full(worker.base, context, device=worker.device)
    return train(worker.model(), context)


def training_context(worker: Worker, job: JobRecord, raise_if_stopped: Callable[[], None]) -> TrainContext:
    """Reads a job's data and encodes it.

    Raises:
        BaseUnusable: the job is for another base.
        NotFound, ArtifactError: its data can't be read.
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
    return context


def read_dataset(worker: Worker, job: JobRecord, dataset: str) -> Examples:
    """Reads a dataset of the job's tenant."""
    with worker.registry.reading() as session:
        record = datasets.get(session, dataset, tenant=job.tenant)
    return read_examples(worker.registry.artifacts.read(record.artifact, "data.jsonl"), record.filename)


def encode_examples(worker: Worker, job: JobRecord, examples: Examples) -> list[TrainingExample]:
    """Encodes examples. A template that writes the date gets the job's submission date, so that every attempt trains
    on the same tokens."""
    tokenizer = worker.tokenizer.at_time(datetime.fromtimestamp(job.created_at, UTC))
    return encode_all(tokenizer, examples.examples, job.spec.train_on)


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


def remove_checkpoints(worker: Worker, job: JobRecord, location: Path | str | None = None) -> None:
    """Removes a job's checkpoints; what can't be removed now is left to the next clean-up.

    Args:
        location: folder or URL of some of them; None: all.
    """
    try:
        delete_all(location or worker.checkpoint_location(job))
    except (LoramillError, OSError) as error:
        log.warning("job %s: the checkpoints can't be removed now: %s", job.id, error)
