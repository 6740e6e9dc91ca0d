"""Leases: how a worker takes, keeps and ends a job.

A worker leases a job for some seconds and extends the lease with heartbeats. Each lease increments the job's
`attempt`, and a worker passes its attempt with every change. If a worker was silent for too long and the job was leased
to another one, all of its changes raise LeaseLost. This fence prevents anything from being published twice or in part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from sqlalchemy.orm import Session

from loramill.errors import (
    InvalidRequest,
    JobCancelled,
    JobError,
    LeaseLost,
    LoramillError,
    NotFound,
    OutOfMemory,
)
from loramill.registry import adapters
from loramill.registry.database.tables import JobRow
from loramill.registry.jobs import queue, sweeps, transitions
from loramill.types import Executor, JobRecord, JobSpec, JobStatus, PendingAction, SweepCandidate, VersionRecord


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Progress of a job, as its worker reports it; a metric that is None keeps its previous value.

    Attributes:
        step: optimizer steps done.
        trained_tokens: tokens trained on so far, prompts included.
        loss: loss of the last step, in nats per token.
        valid_loss: loss of the last validation, in nats per token.
        sweep: the candidates of a sweep.
    """

    step: int
    trained_tokens: int
    loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    sweep: Sequence[SweepCandidate] | None = None


def lease(
    session: Session,
    owner: str,
    *,
    now: float,
    seconds: float,
    max_attempts: int,
    executor: Executor | None = None,
    job_id: str | None = None,
    base: str | None = None,
    reclaim: bool = True,
    admits: Callable[[JobRecord], bool] | None = None,
) -> JobRecord | None:
    """Leases the next queued job to `owner` for some seconds; returns None if no job can start.

    The next job is the one of the highest priority; then of the tenant that was served least relative to its weight;
    then the oldest. No tenant has more running jobs than its quota. A running job whose lease has expired is queued
    first, or has failed after `max_attempts` leases.

    Args:
        executor: only jobs for this executor; None: any.
        job_id: only this job; None: any.
        base: only jobs of the base with this fingerprint; None: any.
        reclaim: first reclaim jobs whose lease has expired. False right after an outage of the database, when their
            workers are about to send heartbeats again.
        admits: whether the owner has room for a job; None: for any. No other job is leased in place of the next one
            if it has not, so that small jobs can't overtake a large one forever.
    """
    if reclaim:
        reclaim_expired(session, now=now, max_attempts=max_attempts)
    row = queue.next_job(session, now, executor, base) if job_id is None else queue.job_by_id(session, job_id, base)
    if row is None or (admits is not None and not admits(transitions.to_record(row))):
        return None
    transitions.start(session, row, owner, now, seconds, max_attempts)
    return transitions.to_record(row)


def reclaim_expired(session: Session, *, now: float, max_attempts: int) -> int:
    """Ends all leases that have expired; returns their number.

    Each job is queued again, unless it has a pending cancel or pause, has no attempts left, or lost two workers in a
    row after the same step, which is what running out of memory looks like. If other jobs shared its session, one of
    them may be the cause: the job then has a session for itself from the next attempt on, with all of its attempts. A
    loss after a later step than every loss before uses no attempt and gives back those used before: such a job makes
    progress however often it loses its node, and the number of such losses is limited by its number of steps.
    """
    found = queue.expired_leases(session, now)
    for row in found:
        _reclaim(session, row, max_attempts)
    return len(found)


def heartbeat(
    session: Session, job_id: str, attempt: int, progress: JobProgress, *, now: float, seconds: float
) -> PendingAction | None:
    """Extends the lease to `now + seconds` and records the job's progress.

    Returns:
        What the worker has to do: stop ("cancel"), or write a checkpoint and stop ("pause", "preempt"), and then call
        `release`. None: continue.

    Raises:
        LeaseLost: another worker has the job, or the job has ended; stop at once.
    """
    row = lock_held(session, job_id, attempt)
    row.lease_until = now + seconds
    row.step, row.trained_tokens = progress.step, progress.trained_tokens
    for metric in ("loss", "valid_loss", "tokens_per_second"):
        if (value := getattr(progress, metric)) is not None:
            setattr(row, metric, value)
    if progress.sweep is not None:
        row.sweep = sweeps.to_rows(progress.sweep)
    session.flush()
    return cast("PendingAction | None", row.pending_action)


def publish(
    session: Session,
    job_id: str,
    attempt: int,
    version: VersionRecord,
    *,
    step: int | None = None,
    trained_tokens: int | None = None,
    result: str | None = None,
) -> JobRecord:
    """Ends the job with its version, whose artifact is already stored. The same call again changes nothing.

    The first version of an adapter becomes its champion, a later one its challenger. The spec of a sweep's job gets the
    values of the best candidate.

    Args:
        step: final step; None: the last step of the spec.
        trained_tokens: final number of trained tokens; None: that of the last heartbeat.
        result: artifact of the weights of a full fine-tune, already stored.

    Raises:
        LeaseLost: another worker has the job, or the job has ended in another way.
        JobCancelled: the job's owner cancelled it; call `fail` with this error.
        InvalidRequest: the version is of another job, base or tenant.
    """
    row = _lock(session, job_id, attempt)
    if (row.status, row.attempt, row.version) == (JobStatus.SUCCEEDED, attempt, version.id):
        return transitions.to_record(row)
    _check_held(row, attempt)
    if row.pending_action == "cancel":
        raise JobCancelled(f"Job {row.id} was cancelled by its owner.")
    spec = JobSpec.model_validate(row.spec)
    if (version.job, version.base) != (row.id, spec.base) or not version.adapter.startswith(f"{row.tenant}/"):
        raise InvalidRequest(f"Version {version.id} names another tenant, job or base than {row.id}; publish that one.")
    # The adapter may have been renamed since the worker read the job.
    version = version.model_copy(update={"adapter": spec.adapter})
    adapters.get_or_create(session, spec.adapter_name)
    alias = adapters.add_version(session, version)
    row.version, row.result, row.pending_action = version.id, result, None
    row.spec = {**row.spec, **sweeps.best_values(row.sweep or ())}
    row.step = spec.steps if step is None else step
    row.trained_tokens = row.trained_tokens if trained_tokens is None else trained_tokens
    transitions.stop(session, row, JobStatus.SUCCEEDED)
    suffix = f"as {alias}" if alias else "again; it is already the champion"
    transitions.add_event(session, row, f"Published {spec.adapter_name.at(version.id)} {suffix}.")
    return transitions.to_record(row)


def fail(
    session: Session,
    job_id: str,
    attempt: int,
    error: LoramillError,
    *,
    retry: bool,
    backoff_seconds: float = 0.0,
    now: float | None = None,
) -> JobRecord:
    """Ends an attempt with an error: queues the job again if `retry` and attempts are left, otherwise fails it.

    A job with a pending cancel is cancelled whatever the error. Whatever `retry` is, a job that ran out of memory is
    tried once more with half as many tokens per forward pass and then, if it shared its session, in one for itself.

    Args:
        backoff_seconds: delay before the first retry; it doubles with each further one, see `queue.backoff_delay`.
        now: when the delay begins; None: the current time.

    Raises:
        LeaseLost: another worker has the job, or the job has ended.
    """
    row = lock_held(session, job_id, attempt)
    now = time.time() if now is None else now
    failures = row.attempt - row.returned
    if row.pending_action == "cancel" or isinstance(error, JobCancelled):
        transitions.cancel(session, row)
    elif isinstance(error, OutOfMemory):
        row.returned += 1  # this retry happens even if no attempts are left
        transitions.retry_out_of_memory(session, row, error)
    elif row.pending_action == "pause" and retry:
        transitions.pause(session, row)
    elif retry and failures < (row.max_attempts or 0):
        seconds = queue.backoff_delay(backoff_seconds, failures, row.id, attempt)
        row.not_before = now + seconds if seconds else None
        transitions.stop(session, row, JobStatus.QUEUED)
        message = f"Attempt {attempt} failed and will be retried in {seconds:.0f} s: {error.message}"
        transitions.add_event(session, row, message, level="warn")
    else:
        transitions.fail(session, row, error)
    return transitions.to_record(row)


def release(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    error: LoramillError | None = None,
    backoff_seconds: float = 0.0,
    now: float | None = None,
) -> JobRecord:
    """Gives a job back without using up an attempt: it is cancelled or paused if that is pending, otherwise queued.

    Args:
        error: an outage that the job did not cause; the job then waits before it starts again.
        backoff_seconds: delay after the first outage; it doubles with each further one, up to
            `queue.MAX_OUTAGE_DELAY_SECONDS`.
        now: when the delay begins; None: the current time.

    Raises:
        LeaseLost: another worker has the job, or the job has ended.
    """
    row = lock_held(session, job_id, attempt)
    row.returned += 1
    if row.pending_action == "cancel":
        transitions.cancel(session, row)
    elif row.pending_action == "pause":
        transitions.pause(session, row)
    else:
        row.pending_action = None
        if error is not None:
            seconds = queue.backoff_delay(
                backoff_seconds, row.returned, row.id, attempt, max_seconds=queue.MAX_OUTAGE_DELAY_SECONDS
            )
            row.not_before = (time.time() if now is None else now) + seconds if seconds else None
        transitions.stop(session, row, JobStatus.QUEUED)
        message = f"Attempt {attempt} stopped at step {row.step}; the job resumes when a worker is free."
        if error is not None:
            message += f" This uses up no attempt: {error.message}"
        transitions.add_event(session, row, message, level="info" if error is None else "warn")
    return transitions.to_record(row)


def _reclaim(session: Session, row: JobRow, max_attempts: int) -> None:
    lost_twice, row.lost_step = row.lost_step == row.step, row.step
    if row.step > (row.max_lost_step or 0):
        row.max_lost_step, row.returned = row.step, row.attempt
    no_attempts_left = row.attempt - row.returned >= max_attempts
    if row.pending_action == "cancel":
        transitions.cancel(session, row)
    elif row.pending_action == "pause":
        transitions.pause(session, row)
    elif row.shared and not row.alone and (lost_twice or no_attempts_left):
        reason = f"The worker of attempt {row.attempt} disappeared again after step {row.step}."
        transitions.retry_alone(session, row, reason)
    elif no_attempts_left:
        message = (
            f"Job {row.id} was started {row.attempt} times and its worker disappeared each time, last {row.owner} "
            f"after step {row.step}, without getting past step {row.max_lost_step or 0}. It may need more memory "
            "than there is: see that worker's log."
        )
        transitions.fail(session, row, JobError(message))
    elif lost_twice:
        message = f"Two workers disappeared after step {row.step}, as if the kernel had killed them for lack of memory."
        transitions.retry_out_of_memory(session, row, OutOfMemory(message))
    else:
        row.pending_action = None
        transitions.stop(session, row, JobStatus.QUEUED)
        message = f"The worker of attempt {row.attempt} disappeared after step {row.step}; the job is queued again."
        transitions.add_event(session, row, message, level="warn")


def lock_held(session: Session, job_id: str, attempt: int) -> JobRow:
    """Returns the job's row, locked, if this attempt holds the job.

    Raises:
        LeaseLost: another worker has the job, or the job has ended.
    """
    row = _lock(session, job_id, attempt)
    _check_held(row, attempt)
    return row


def _lock(session: Session, job_id: str, attempt: int) -> JobRow:
    try:
        return transitions.lock_job(session, job_id)
    except NotFound as error:
        raise LeaseLost(
            f"Attempt {attempt} of job {job_id} no longer holds it: the job was deleted. This worker may change "
            "nothing and has to stop."
        ) from error


def _check_held(row: JobRow, attempt: int) -> None:
    if row.status is not JobStatus.RUNNING or row.attempt != attempt:
        raise LeaseLost(
            f"Attempt {attempt} of job {row.id} no longer holds it: the job is {row.status} at attempt {row.attempt}. "
            "This worker may change nothing and has to stop."
        )
