"""Leases: what a worker does with a job that it holds.

A worker leases a job for some seconds and extends the lease with heartbeats. Each lease raises the job's
`attempt`, and whatever a worker changes it changes with its attempt: when it was silent for too long and another
worker has leased the job, everything it still tries raises LeaseLost. That is the fence that lets nothing be
published twice or by halves.
"""

from __future__ import annotations

import time

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
from loramill.registry.jobs import queue, transitions
from loramill.types import Executor, JobRecord, JobSpec, JobStatus, PendingAction, VersionRecord


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
) -> JobRecord | None:
    """Gives `owner` a job for so many seconds: of those that wait the one of the highest priority, then of the tenant
    that has had least for its weight, then the oldest. No tenant has more jobs running than its quota allows.

    A running job whose lease has run out waits as well; after `max_attempts` leases it has failed instead.
    None when nothing waits.

    Args:
        executor: takes only jobs for this one; None: any.
        job_id: takes only this job.
        base: takes only jobs of the base with this fingerprint; None: of any.
        settle: first takes jobs whose lease has run out from their workers; false right after an outage of the
            database, when these workers are about to report again.
    """
    if reclaim:
        reclaim_expired(session, now=now, max_attempts=max_attempts)
    row = queue.next_job(session, now, executor, base) if job_id is None else queue.job_by_id(session, job_id, base)
    if row is None:
        return None
    transitions.start(session, row, owner, now, seconds, max_attempts)
    return transitions.to_record(row)


def reclaim_expired(session: Session, *, now: float, max_attempts: int) -> int:
    """Takes every job from the worker whose lease has run out; returns how many there were.

    It waits again, unless its owner asked for something else, its attempts are used up, or its workers vanished twice
    in a row after the same step: that is what running out of memory looks like. A loss after a later step
    than at every loss before uses no attempt, and gives back those that were used: such a job progresses, however often
    it loses its node, and since its steps are finite, so are these losses.
    """
    found = queue.expired_leases(session, now)
    for row in found:
        _reclaim(session, row, max_attempts)
    return len(found)


def heartbeat(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    now: float,
    seconds: float,
    step: int,
    trained_tokens: int,
    loss: float | None = None,
    valid_loss: float | None = None,
    tokens_per_second: float | None = None,
) -> PendingAction | None:
    """Extends the lease to `now + seconds` and records how far the job is; a figure that is None stays as it was.

    Returns:
        What the worker is asked to do: stop ("cancel"), or write a checkpoint and stop ("pause", "preempt"); then it
        calls `release`.

    Raises:
        LeaseLost: another worker has the job, or it has ended; stop at once.
    """
    row = lock_held(session, job_id, attempt)
    row.lease_until = now + seconds
    row.step, row.trained_tokens = step, trained_tokens
    row.loss = row.loss if loss is None else loss
    row.valid_loss = row.valid_loss if valid_loss is None else valid_loss
    row.tokens_per_second = row.tokens_per_second if tokens_per_second is None else tokens_per_second
    session.flush()
    return transitions.to_record(row).pending_action


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
    """Ends the job with its version, whose artifact is stored already; the same call again changes nothing.

    An adapter's first version becomes champion, a later one challenger.

    Args:
        step: in the end; None: the spec's last.
        trained_tokens: in the end; None: as the last heartbeat said.
        result: the artifact of a full fine-tune's weights, stored already.

    Raises:
        LeaseLost: another worker has the job, or it has ended otherwise.
        JobCancelled: its owner wants it to stop; call `fail` with this error.
        InvalidRequest: the version isn't this job's.
    """
    row = _locked(session, job_id, attempt)
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
    row.step = spec.steps if step is None else step
    row.trained_tokens = row.trained_tokens if trained_tokens is None else trained_tokens
    transitions.stop(session, row, JobStatus.SUCCEEDED)
    as_what = f"as {alias}" if alias else "again; it is the champion already"
    transitions.tell(session, row, f"Published {spec.adapter_name.at(version.id)} {as_what}.")
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
    """Ends an attempt: the job is queued again if `retry` and attempts are left, else it has failed.

    A job that its owner cancelled is cancelled, whatever the error. One that found no memory is tried once more with
    half as many tokens a forward pass, whatever `retry` says.

    Args:
        backoff_seconds: before a first retry, then twice as long each time; see `queue.backoff`.
        now: when the wait begins; None: now.

    Raises:
        LeaseLost: another worker has the job, or it has ended.
    """
    row = lock_held(session, job_id, attempt)
    now = time.time() if now is None else now
    failures = row.attempt - row.returned
    if row.pending_action == "cancel" or isinstance(error, JobCancelled):
        transitions.cancel(session, row)
    elif isinstance(error, OutOfMemory):
        row.returned += 1  # whatever attempts are left, this retry is had
        transitions.retry_with_smaller_microbatch(session, row, error)
    elif row.pending_action == "pause" and retry:
        transitions.pause(session, row)
    elif retry and failures < (row.max_attempts or 0):
        seconds = queue.backoff_delay(backoff_seconds, failures, row.id, attempt)
        row.not_before = now + seconds if seconds else None
        transitions.stop(session, row, JobStatus.QUEUED)
        message = f"Attempt {attempt} failed and will be tried again in {seconds:.0f} s: {error.message}"
        transitions.tell(session, row, message, level="warn")
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
    """Gives a job back: to be cancelled or paused if that was asked, else to go on elsewhere; uses up no attempt.

    Args:
        error: an outage that the job did not cause; the job then waits before it starts again.
        backoff_seconds: the first wait; each further one is twice as long, up to `queue.LONGEST_PAUSE`.
        now: when the wait begins; None: now.

    Raises:
        LeaseLost: another worker has the job, or it has ended.
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
        message = f"Attempt {attempt} stopped at step {row.step}; the job goes on when a worker is free."
        if error is not None:
            message += f" This uses up no attempt: {error.message}"
        transitions.tell(session, row, message, level="info" if error is None else "warn")
    return transitions.to_record(row)


def _reclaim(session: Session, row: JobRow, max_attempts: int) -> None:
    twice, row.lost_step = row.lost_step == row.step, row.step
    if row.step > (row.max_lost_step or 0):
        row.max_lost_step, row.returned = row.step, row.attempt
    if row.pending_action == "cancel":
        transitions.cancel(session, row)
    elif row.pending_action == "pause":
        transitions.pause(session, row)
    elif row.attempt - row.returned >= max_attempts:
        message = (
            f"Job {row.id} was started {row.attempt} times and its worker disappeared each time, at last {row.owner} "
            f"after step {row.step}, without getting further than step {row.max_lost_step or 0}. It may need more "
            "memory "
            "than there is: see that worker's log."
        )
        transitions.fail(session, row, JobError(message))
    elif twice:
        message = f"Two workers vanished after step {row.step}, as the kernel ends those that take too much memory."
        transitions.retry_with_smaller_microbatch(session, row, OutOfMemory(message))
    else:
        row.pending_action = None
        transitions.stop(session, row, JobStatus.QUEUED)
        message = f"The worker of attempt {row.attempt} vanished after step {row.step}; the job waits for another."
        transitions.tell(session, row, message, level="warn")


def lock_held(session: Session, job_id: str, attempt: int) -> JobRow:
    """The job's row, locked, if this attempt holds it.

    Raises:
        LeaseLost: another worker has the job, or it has ended.
    """
    row = _locked(session, job_id, attempt)
    _check_held(row, attempt)
    return row


def _locked(session: Session, job_id: str, attempt: int) -> JobRow:
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
