"""The training stage: submits one job per adapter, and waits until all have ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable, JobCancelled, JobError, NotFound, SetupError, Unavailable
from loramill.names import AdapterName
from loramill.pipelines.nightly.budget import decide_training
from loramill.pipelines.nightly.collection.preferences import PreferenceFiles, preference_spec
from loramill.pipelines.nightly.context import NightlyContext, NightlyProgress
from loramill.pipelines.nightly.spending import postpone, spending, stop_queued
from loramill.pipelines.nightly.training.choice import PREFERENCES, StartChoice, after_preferences, choose_start
from loramill.pipelines.nightly.training.recorded import started_jobs
from loramill.registry import adapters, jobs, nightly
from loramill.sizing import ADJUSTABLE
from loramill.submission.dataset_checks import DatasetChecks
from loramill.submission.submit import SubmissionContext, Submitter, check_spec, queue
from loramill.types import Alias, JobRecord, JobSpec, JobStatus

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
    checks = DatasetChecks(context.registry.artifacts, ChatTokenizer.load(context.base.folder))
    submission = SubmissionContext(context.base, context.settings.jobs, checks)
    for adapter in waiting:
        if "job" not in begun.get(adapter, {}):
            context.attempt(adapter, "train", partial(_submit, context, submission, adapter))
    open_jobs = {adapter: started_jobs(result) for adapter, result in context.in_progress("train").items()}
    _wait(context, submission, {adapter: jobs for adapter, jobs in open_jobs.items() if jobs}, poll_seconds)


def _wait(
    context: NightlyContext,
    submission: SubmissionContext,
    open_jobs: dict[str, dict[str, str]],
    poll_seconds: float,
) -> None:
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
            for adapter in stop_queued(context, {adapter: list(jobs.values()) for adapter, jobs in found.items()}):
                del open_jobs[adapter], found[adapter]
            for adapter, jobs_ in found.items():
                step = partial(_check_jobs, context, submission, adapter, jobs_, open_jobs[adapter])
                checked = context.attempt(adapter, "train", step)
                ended = all(job.status.final for job in jobs_.values()) and jobs_.keys() == open_jobs[adapter].keys()
                if ended or not checked:
                    del open_jobs[adapter]
            # A paused job may stay so for days; the others do not wait for it.
            blocked = {adapter: _paused_job(found[adapter]) for adapter in open_jobs}
            if all(blocked.values()):
                for adapter, job in blocked.items():
                    context.fail(adapter, "train", JobError(_paused(job)))
                return
        if open_jobs:
            time.sleep(poll_seconds)


def _submit(context: NightlyContext, submission: SubmissionContext, adapter: str) -> None:
    plan, definition = context.finished(adapter, "collect"), context.definition.for_adapter(adapter).train
    specs = [JobSpec.model_validate(plan[each]) for each in ("spec", "fresh") if each in plan]
    if any(spec.base != context.base.fingerprint for spec in specs):
        raise BaseUnusable("The base has changed since the data was collected.")
    replay = {f"replay_{kind}": str(count) for kind, count in replayed(plan).items()}
    with context.registry.reading() as session:
        # What sizing may adjust does not change the result, and the new data may need other values than the old.
        checked = {
            "champion" if spec.start_from else "fresh": check_spec(
                session,
                spec,
                submission,
                adjustable=ADJUSTABLE,
                executor=definition.options.executor,
                priority=definition.priority,
                metadata=dict(definition.options.metadata or {}) | {"nightly_run": context.run.id} | replay,
            )
            for spec in specs
        }
    cost = sum(job.cost for job in checked.values())
    decision = decide_training(context.definition.budget, spending(context), cost)
    if not decision.start:
        postpone(context, adapter, decision)
        return
    # With the jobs in the step's own transaction, a run that is killed here has neither or both.
    with context.registry.writing() as session:
        queued = {
            start: {"job": queue(session, job, _submitter(context)).id, "tokens": job.cost}
            for start, job in checked.items()
        }
        first = next(iter(queued.values()))["job"]
        context.record_pending(session, adapter, "train", {"job": first, "tokens": cost, "jobs": queued})


def replayed(plan: Mapping[str, Any]) -> dict[str, int]:
    """The number of old examples among the training data of a collected adapter, by kind of replay."""
    return {kind: plan["replay"][kind] for kind in ("plain", "on_policy") if kind in plan.get("replay", {})}


def _poll_jobs(context: NightlyContext, open_jobs: dict[str, dict[str, str]]) -> dict[str, dict[str, JobRecord]]:
    """The adapters' jobs by start; one that was deleted fails its adapter, and is removed from `open_jobs`."""
    found = {}
    for adapter, ids in list(open_jobs.items()):
        try:
            with context.registry.reading() as session:
                found[adapter] = {start: jobs.get(session, job) for start, job in ids.items()}
        except NotFound as error:
            context.fail(adapter, "train", error)
            del open_jobs[adapter]
    return found


def _check_jobs(
    context: NightlyContext,
    submission: SubmissionContext,
    adapter: str,
    found: Mapping[str, JobRecord],
    open_jobs: dict[str, str],
) -> None:
    """Finishes the step of an adapter whose jobs have ended, or starts its last one; raises if there is no version."""
    shown = next((job for job in found.values() if not job.status.final), next(iter(found.values())))
    context.progress(NightlyProgress("train", adapter, shown.step, shown.spec.steps, shown.status))
    for job in found.values():
        if job.status is JobStatus.QUEUED and job.spec.base != context.base.fingerprint:
            _cancel_all(context, found)
            raise BaseUnusable(
                f"The base has changed since the job {job.id} was submitted, so that it can't run; it was cancelled."
            )
    if not all(job.status.final for job in found.values()):
        return
    choice = choose_start(found)
    if choice is None:
        raise _failure(next(iter(found.values())))
    plan, last, waits = context.finished(adapter, "collect"), found.get(PREFERENCES), ""
    if "preferences" in plan and last is None:
        waits = _start_preferences(context, submission, plan, found, found[choice.start], open_jobs)
        if not waits:
            return
    if waits or (last is not None and last.status is JobStatus.CANCELLED):
        with context.registry.writing() as session:
            sources = PreferenceFiles.model_validate(plan["preferences"]).sources
            nightly.release_files(session, context.run.id, adapter, sources)
    _finish(context, adapter, found, after_preferences(choice, last, waits))


def _start_preferences(
    context: NightlyContext,
    submission: SubmissionContext,
    plan: Mapping[str, Any],
    found: Mapping[str, JobRecord],
    start: JobRecord,
    open_jobs: dict[str, str],
) -> str:
    """Submits the job that continues the version of another job with preferences; returns why not, or nothing."""
    if plan["champion"] is None:  # the first version becomes the champion by itself
        return "the adapter has its first version"
    pairs, name = PreferenceFiles.model_validate(plan["preferences"]), start.spec.adapter_name
    spec = preference_spec(name, pairs, context.base, str(start.version), start.spec)
    with context.registry.reading() as session:
        job = check_spec(
            session,
            spec,
            submission,
            adjustable=ADJUSTABLE,
            priority=context.definition.for_adapter(start.spec.adapter).train.priority,
            metadata={"nightly_run": context.run.id},
        )
    decision = decide_training(context.definition.budget, spending(context), job.cost)
    if not decision.start:
        return decision.reason
    with context.registry.writing() as session:
        started = {kind: {"job": each.id, "tokens": each.trained_tokens} for kind, each in found.items()}
        open_jobs[PREFERENCES] = queue(session, job, _submitter(context)).id
        started[PREFERENCES] = {"job": open_jobs[PREFERENCES], "tokens": job.cost}
        context.record_pending(session, start.spec.adapter, "train", {"job": start.id, "jobs": started})
    return ""


def _finish(context: NightlyContext, adapter: str, found: Mapping[str, JobRecord], choice: StartChoice) -> None:
    chosen = found[choice.start]
    result = {"job": chosen.id, "version": chosen.version, "error": None} | {
        "tokens": sum(job.trained_tokens for job in found.values()),
        "jobs": {start: {"job": job.id, "tokens": job.trained_tokens} for start, job in found.items()},
        "start": choice.start,
        "choice": choice.reason,
    }
    with context.registry.writing() as session:
        context.check_lease(session)
        if choice.reason and chosen.version != adapters.get(session, adapter).champion:
            adapters.move(session, AdapterName.parse(adapter), Alias.CHALLENGER, chosen.version, choice.reason)
        context.finish(session, adapter, "train", result)


def _cancel_all(context: NightlyContext, found: Mapping[str, JobRecord]) -> None:
    with context.registry.writing() as session:
        for job in found.values():
            if not job.status.final:
                jobs.cancel(session, job.id)


def _failure(job: JobRecord) -> JobError:
    if job.status is JobStatus.CANCELLED:
        return JobCancelled(f"The job {job.id} was cancelled.")
    return JobError(job.error_message or f"The job {job.id} failed.")


def _submitter(context: NightlyContext) -> Submitter:
    return Submitter(tenant=None, key_id="nightly", request_id=context.run.id)


def _paused_job(found: Mapping[str, JobRecord]) -> str | None:
    """The ID of a paused job, if all of an adapter's jobs that have not ended are paused."""
    unfinished = [job for job in found.values() if not job.status.final]
    paused = bool(unfinished) and all(job.status is JobStatus.PAUSED for job in unfinished)
    return unfinished[0].id if paused else None


def _paused(job: str | None) -> str:
    return (
        f"The job {job} is paused; after `loramill jobs resume {job}` its version becomes the challenger, which "
        "`loramill promote` can promote."
    )
