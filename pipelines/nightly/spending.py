"""What a run has spent, and what happens to adapters whose training the budget does not allow any more."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from loramill.errors import NotFound
from loramill.pipelines.nightly.budget import BudgetDecision, Spending, busy_seconds, decide_training
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.training.recorded import planned_tokens
from loramill.registry import jobs, nightly
from loramill.types import JobRecord, JobStatus


def spending(context: NightlyContext) -> Spending:
    """Returns what the run has spent so far; nothing without a budget."""
    if not context.definition.budget.limited:
        return Spending(0.0, 0.0, 0.0)
    now = time.time()
    steps = [step.result for step in context.steps("train") if "waiting" not in step.result]
    intervals, tokens = [], 0.0
    for job_id, planned in (each for result in steps for each in planned_tokens(result).items()):
        job = _find_job(context, job_id)
        if job is None or job.started_at is None:
            tokens += planned
            continue
        intervals.append((job.started_at, job.finished_at or now))
        tokens += job.trained_tokens if job.status.final else planned
    settings = context.settings.jobs
    share = settings.gpu_share if settings.on_gpu else 1.0
    return Spending(
        wall_seconds=now - context.run.created_at,
        gpu_seconds=busy_seconds(intervals, settings.sessions) * share,
        tokens=tokens,
    )


def stop_queued(context: NightlyContext, found: Mapping[str, Sequence[JobRecord]]) -> list[str]:
    """Cancels the jobs that have not begun, if the budget is spent.

    Returns:
        The adapters all of whose jobs it cancelled; their data waits.
    """
    queued = {adapter: [job for job in each if _not_begun(job)] for adapter, each in found.items()}
    if not any(queued.values()) or not context.definition.budget.limited:
        return []
    decision = decide_training(context.definition.budget, spending(context))
    if decision.start:
        return []
    stopped = []
    for adapter, open_jobs in queued.items():
        cancelled = [job for job in open_jobs if _cancel(context, job)]
        if cancelled and len(cancelled) == len(found[adapter]):
            postpone(context, adapter, decision)
            stopped.append(adapter)
    return stopped


def _not_begun(job: JobRecord) -> bool:
    return job.status is JobStatus.QUEUED and job.started_at is None


def _cancel(context: NightlyContext, job: JobRecord) -> bool:
    """Cancels a job that has not begun; False if it has in the meantime."""
    with context.registry.writing() as session:
        queued = jobs.get(session, job.id).status is JobStatus.QUEUED
        if queued:
            jobs.cancel(session, job.id)
    return queued


def postpone(context: NightlyContext, adapter: str, decision: BudgetDecision) -> None:
    """Lets an adapter's data wait for the next run."""
    with context.registry.writing() as session:
        nightly.release(session, context.run.id, adapter)
        result = {"waiting": f"{decision.reason}; the next nightly run trains it."}
        context.report(context.record_pending(session, adapter, "train", result))


def _find_job(context: NightlyContext, job: str) -> JobRecord | None:
    try:
        with context.registry.reading() as session:
            return jobs.get(session, job)
    except NotFound:
        return None
