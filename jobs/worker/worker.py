"""A worker: leases one job after another, trains it on a resident base, and publishes its version. No Ray."""

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

from loramill.data.examples import Example, Examples, read_examples
from loramill.data.tokenizer import ChatTokenizer, EncodedExample
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
from loramill.jobs.train.loop import TrainingProgress, train
from loramill.jobs.worker import publish
from loramill.jobs.worker.lease import DATABASE_OUTAGE_SECONDS, Lease, retry_while_unavailable
from loramill.jobs.worker.loggers import open_loggers
from loramill.models.catalog import Base
from loramill.registry import Registry, datasets, jobs
from loramill.settings import JobSettings
from loramill.types import Executor, JobRecord

log = logging.getLogger(__name__)

#: What another attempt would meet again: bad or unreadable data, a spec that fits nothing, divergence.
PERMANENT_ERRORS = (InvalidRequest, NotFound, AdapterInvalid, BaseUnusable, ArtifactError, JobError)

#: Outages, which no job causes and which end for all jobs at once: a store or database that is away, or a store that
#: refuses access, for example since its credentials have expired. They cost no attempt.
OUTAGE_ERRORS = (Unavailable, StoreUnusable)

#: Seconds between looks at an empty queue, and after an outage; the latter double with each job that fails for one, up
#: to the last.
POLL_SECONDS, OUTAGE_PAUSE_SECONDS, MAX_OUTAGE_PAUSE_SECONDS = 0.25, 3.0, 60.0


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker needs, all of it kept from job to job.

    Attributes:
        owner: names it in the record.
        model: gives the resident base on `device`, always the same one; a full fine-tune loads one of its own.
        checkpoints: folder or fsspec URL that all of the pool's machines reach.
        logs: where TensorBoard's runs are, if the settings ask for these.
        executor: whose jobs it takes; None: any.
        processes: that share each job's passes; the first alone leases, reports and publishes.
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
        """Where the job keeps its checkpoints."""
        return f"{self.checkpoints}/{job.id}" if isinstance(self.checkpoints, str) else self.checkpoints / job.id


def run_jobs(worker: Worker, *, should_stop: Callable[[float], bool]) -> int:
    """Runs jobs as long as there are any; returns how many. `until(idle)` says, between jobs, whether to end."""
    done, idle_since, settle_from, pause = 0, time.monotonic(), 0.0, OUTAGE_PAUSE_SECONDS
    while True:
        try:
            if should_stop(time.monotonic() - idle_since):
                return done
            job = lease_next_job(worker, settle=time.monotonic() >= settle_from)
        except LoramillError as error:
            log.warning("no job could be leased, trying again: %s", error.message)
            # Workers that hold a job may have been silent while the database was: their heartbeats come first.
            settle_from = time.monotonic() + OUTAGE_PAUSE_SECONDS + worker.settings.lease_seconds
            time.sleep(OUTAGE_PAUSE_SECONDS)
            continue
        if job is None:
            time.sleep(POLL_SECONDS)
            continue
        ended = run_attempt(worker, job)
        done, idle_since = done + 1, time.monotonic()
        if isinstance(ended, OUTAGE_ERRORS):
            time.sleep(pause)
            pause = min(2 * pause, MAX_OUTAGE_PAUSE_SECONDS)
        else:
            pause = OUTAGE_PAUSE_SECONDS


def run_next_job(worker: Worker) -> bool:
    """Leases a job and takes it to its end, or to the point where it is another's; False if none waits."""
    job = lease_next_job(worker)
    if job is None:
        return False
    run_attempt(worker, job)
    return True


def lease_next_job(worker: Worker, job_id: str | None = None, *, settle: bool = True) -> JobRecord | None:
    """Leases the next job, or the one with this id; None if it doesn't wait, or is of another base.

    `settle` first takes jobs from workers that vanished.

    Raises:
        Unavailable, DiskFull, DatabaseUnusable: the record can't be reached.
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
    """Takes a leased job to its end, or to the point where it is another's; returns what ended it before, if anything.

    Whatever happens is in the record, or, if that can't be reached, follows from the lease, which runs out.
    """
    log.info("job %s of %s: attempt %d", job.id, job.tenant, job.attempt)
    try:
        with Lease(worker.registry, job, worker.settings) as lease:
            run_job(worker, job, lease)
    except LeaseLost as error:
        log.warning("job %s: the lease was lost; another worker has it", job.id)
        return error
    except LoramillError as error:
        record_attempt_end(worker, job, error)
        return error
    except Exception as error:  # a job must not take its session down with it
        log.exception("job %s: failed", job.id)
        failed = LoramillError(f"{type(error).__name__}: {error}")
        record_attempt_end(worker, job, failed)
        return failed
    return None


def run_job(worker: Worker, job: JobRecord, lease: Lease) -> None:
    """Trains `job` from its last checkpoint, or from the start, and publishes the version.

    Raises:
        LoramillError: the job can't succeed (bad data, divergence, another base), or isn't this worker's any more.
    """
    loggers = open_loggers(worker.settings.loggers, run=job.id, spec=job.spec, folder=worker.logs)
    try:
        with loggers as tell, closing(training_steps(worker, job, lease.raise_if_stopped)) as progress:
            for point in progress:
                lease.report(point)
                tell(point)
                if point.valid_loss is not None:
                    publish.checkpoint(worker, job, point)
    finally:
        lease.flush()
    publish.version(worker, job, lease.last_progress)
    remove_checkpoints(worker, job)


def training_steps(
    worker: Worker, job: JobRecord, raise_if_stopped: Callable[[], None]
) -> Generator[TrainingProgress, None, None]:
    """The job's steps, each taken when it is asked for.

    Raises:
        LoramillError: as `train` does; BaseUnusable if the job is for another base, NotFound or ArtifactError if its
            data can't be read.
    """
    spec, registry = job.spec, worker.registry
    if spec.base != worker.base.fingerprint:
        raise BaseUnusable(
            f"The job was submitted for the base {spec.base[:12]}, and this pool serves {worker.base.fingerprint[:12]} "
            f"('{worker.base.name}'): submit it again."
        )
    examples = read_dataset(worker, job, spec.train)
    data = (
        encode_examples(worker, job, examples),
        encode_examples(worker, job, read_dataset(worker, job, spec.valid)) if spec.valid else [],
    )
    if worker.process_group.rank == 0:
        report_supervised_tokens(worker, job, examples.examples, data[0])
    start_from = registry.artifacts.fetch(spec.start_from) if spec.start_from else None
    if spec.method == "full":
        from loramill.jobs.train.full_finetune import train_full  # with DeepSpeed, which nothing else needs

        return train_full(
            worker.base,
            *data,
            spec,
            device=worker.device,
            checkpoints=worker.checkpoint_location(job),
            start_from=start_from,
            check=raise_if_stopped,
            micro_tokens=job.micro_tokens,
            processes=worker.process_group,
        )
    return train(
        worker.model(),
        *data,
        spec,
        folder=worker.base.folder,
        checkpoints=worker.checkpoint_location(job),
        start_from=start_from,
        check=raise_if_stopped,
        micro_tokens=job.micro_tokens,
        processes=worker.process_group,
    )


def read_dataset(worker: Worker, job: JobRecord, dataset: str) -> Examples:
    """The examples of a dataset of the job's tenant."""
    with worker.registry.reading() as session:
        found = datasets.get(session, dataset, tenant=job.tenant)
    return read_examples(worker.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename)


def encode_examples(worker: Worker, job: JobRecord, examples: Examples) -> list[EncodedExample]:
    """The tokens of examples. A template that writes the date gets that of the submission, so that every attempt trains
    on the same tokens."""
    tokenizer = worker.tokenizer.at_time(datetime.fromtimestamp(job.created_at, UTC))
    return [tokenizer.encode_example(example, job.spec.train_on) for example in examples.examples]


def report_supervised_tokens(
    worker: Worker, job: JobRecord, examples: Sequence[Example], found: Sequence[EncodedExample]
) -> None:
    """Adds an event to the job's history, once: how many answers and tokens of the training file are trained."""
    parts = sequences(found)
    figures = {
        "examples": len(examples),
        "answers": sum(len(example.answers) if example.prompt is None else 1 for example in examples),
        "trained_answers": sum(len(part.spans) for part in parts),
        "supervised_tokens": sum(map(count_supervised_tokens, parts)),
    }
    message = (
        "Training on {trained_answers} of {answers} answers in {examples} examples: {supervised_tokens} supervised "
        "tokens per epoch."
    )
    with worker.registry.writing() as session:
        if not any("supervised_tokens" in event.data for event in jobs.list_events(session, job.id)):
            jobs.add_event(session, job.id, "info", "message", message.format(**figures), figures)


def record_attempt_end(worker: Worker, job: JobRecord, error: LoramillError) -> None:
    """Records why an attempt ended before its job; the job waits again if it is to go on or that may help."""
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
        retry_while_unavailable(DATABASE_OUTAGE_SECONDS, end_attempt)
    except LeaseLost:
        log.warning("job %s: ended, but the lease was lost before: %s", job.id, error)
    except LoramillError:
        log.exception("job %s: ended (%s), and the record can't be reached; its lease runs out", job.id, error)


def remove_checkpoints(worker: Worker, job: JobRecord) -> None:
    """Removes a job's checkpoints; the next sweep removes those that can't be removed now."""
    try:
        delete_all(worker.checkpoint_location(job))
    except (LoramillError, OSError) as error:
        log.warning("job %s: its checkpoints can't be removed now: %s", job.id, error)
