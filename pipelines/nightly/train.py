"""The training stage: submits one job per adapter, and waits until all have ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable, JobCancelled, JobError, NotFound, SetupError, Unavailable
from loramill.pipelines.nightly.budget import decide_training
from loramill.pipelines.nightly.context import NightlyContext, NightlyProgress
from loramill.pipelines.nightly.spending import postpone, spending, stop_queued
from loramill.registry import jobs
from loramill.sizing import ADJUSTABLE
from loramill.submission.dataset_checks import DatasetChecks
from loramill.submission.submit import SubmissionContext, Submitter, check_spec, queue
from loramill.types import JobRecord, JobSpec, JobStatus

#: Seconds for which a run waits for its jobs while the gateway is unreachable.
UNREACHABLE_SECONDS = 120.0


def train_all(context: NightlyContext, *, poll_seconds: float = 0.5) -> None:
    """Submits a job for each adapter, then waits until all have ended.

    Raises:
        NotRunning, Unavailable: the gateway is unreachable, for `UNREACHABLE_SECONDS` if jobs train already.
    """
    begun = context.in_progress("train")
    waiting = [adapter for adapter in context.remaining("train") if "waiting" not in begun.get(adapter, {})]
    if not waiting:
        return
    context.gateway.check()
    if new := [adapter for adapter in waiting if "job" not in begun.get(adapter, {})]:
        checks = DatasetChecks(context.registry.artifacts, ChatTokenizer.load(context.base.folder))
        submission = SubmissionContext(context.base, context.settings.jobs, checks)
        for adapter in new:
            context.attempt(adapter, "train", partial(_submit, context, submission, adapter))
    open_jobs = {adapter: result["job"] for adapter, result in context.in_progress("train").items() if "job" in result}
    _wait(context, open_jobs, poll_seconds)


def _wait(context: NightlyContext, open_jobs: dict[str, str], poll_seconds: float) -> None:
    unreachable_since: float | None = None
    while open_jobs:
        try:
            context.gateway.check()
            found = _poll_jobs(context, open_jobs)
        except (SetupError, Unavailable):
            unreachable_since = unreachable_since or time.monotonic()
            if time.monotonic() - unreachable_since > UNREACHABLE_SECONDS:
                raise
        else:
            unreachable_since = None
            for adapter in stop_queued(context, found):
                del open_jobs[adapter], found[adapter]
            for adapter, job in found.items():
                checked = context.attempt(adapter, "train", partial(_check_job, context, adapter, job))
                if not checked or job.status.final:
                    del open_jobs[adapter]
            # A paused job may stay so for days; the others do not wait for it.
            if all(found[adapter].status is JobStatus.PAUSED for adapter in open_jobs):
                for adapter, job_id in open_jobs.items():
                    context.fail(adapter, "train", JobError(_paused(job_id)))
                return
        if open_jobs:
            time.sleep(poll_seconds)


def _submit(context: NightlyContext, submission: SubmissionContext, adapter: str) -> None:
    plan = context.finished(adapter, "collect")
    spec = JobSpec.model_validate(plan["spec"])
    if spec.base != context.base.fingerprint:
        raise BaseUnusable("The base has changed since the data was collected.")
    with context.registry.reading() as session:
        # What sizing may adjust does not change the result, and the new data may need other values than the old.
        job = check_spec(
            session,
            spec,
            submission,
            adjustable=ADJUSTABLE,
            priority=context.definition.for_adapter(adapter).train.priority,
            metadata={"nightly_run": context.run.id} | {f"replay_{kind}": str(n) for kind, n in replayed(plan).items()},
        )
    decision = decide_training(context.definition.budget, spending(context), job.cost)
    if not decision.start:
        postpone(context, adapter, decision)
        return
    # With the job in the step's own transaction, a run that is killed here has neither or both.
    with context.registry.writing() as session:
        record = queue(session, job, Submitter(tenant=None, key_id="nightly", request_id=context.run.id))
        context.record_pending(session, adapter, "train", {"job": record.id, "tokens": job.cost})


def replayed(plan: Mapping[str, Any]) -> dict[str, int]:
    """The number of old examples among the training data of a collected adapter, by kind of replay."""
    return {kind: plan["replay"][kind] for kind in ("plain", "on_policy") if kind in plan.get("replay", {})}


def _poll_jobs(context: NightlyContext, open_jobs: dict[str, str]) -> dict[str, JobRecord]:
    """The adapters' jobs; one that was deleted fails its adapter, and is removed from `open_jobs`."""
    found = {}
    for adapter, job_id in list(open_jobs.items()):
        try:
            with context.registry.reading() as session:
                found[adapter] = jobs.get(session, job_id)
        except NotFound as error:
            context.fail(adapter, "train", error)
            del open_jobs[adapter]
    return found


def _check_job(context: NightlyContext, adapter: str, job: JobRecord) -> None:
    """Finishes the step of an adapter whose job has succeeded; raises if the job never will."""
    context.progress(NightlyProgress("train", adapter, job.step, job.spec.steps, job.status))
    if job.status is JobStatus.SUCCEEDED:
        with context.registry.writing() as session:
            result = {"job": job.id, "version": job.version, "tokens": job.trained_tokens, "error": None}
            context.finish(session, adapter, "train", result)
    elif job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"The job {job.id} was cancelled.")
    elif job.status.final:
        raise JobError(job.error_message or f"The job {job.id} failed.")
    elif job.status is JobStatus.QUEUED and job.spec.base != context.base.fingerprint:
        with context.registry.writing() as session:
            jobs.cancel(session, job.id)
        raise BaseUnusable(
            f"The base has changed since the job {job.id} was submitted, so that it can't run; it was cancelled."
        )


def _paused(job: str) -> str:
    return (
        f"The job {job} is paused; after `loramill jobs resume {job}` its version becomes the challenger, which "
        "`loramill promote` can promote."
    )
