"""Reads from the registry what the report of a nightly run needs."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from sqlalchemy.orm import Session

from loramill.errors import ArtifactError, NotFound
from loramill.pipelines.nightly.evaluation.results import GOLDEN_SLICE, slice_kind
from loramill.pipelines.nightly.outcome import metric_of
from loramill.pipelines.nightly.report.cost import JobInterval
from loramill.pipelines.nightly.report.forgetting import RunScores
from loramill.pipelines.nightly.report.recorded import results_by_stage
from loramill.pipelines.nightly.report.summarize import RunRecords
from loramill.pipelines.nightly.rollouts.overview import rollouts_around
from loramill.pipelines.nightly.training.recorded import planned_tokens
from loramill.registry import ArtifactStore, Registry, evaluations, jobs, nightly
from loramill.registry.jobs import history
from loramill.settings import JobSettings, Settings
from loramill.types import Candidate, ExampleResult, JobRecord, NightlyRun, NightlyStep

#: Runs over which forgetting is shown, and runs that are searched for them: many have no work to do.
_SHOWN_RUNS, _SEARCHED_RUNS = 7, 60


def read_records(
    registry: Registry,
    settings: Settings,
    run: NightlyRun,
    *,
    deleted: Sequence[NightlyStep] = (),
    interrupted: str | None = None,
) -> RunRecords:
    """Reads everything about a run.

    Args:
        registry: the registry of the run.
        settings: for the devices of the pool, and the address of the gateway.
        run: the run.
        deleted: steps of adapters that were deleted during the run; they are not in the registry.
        interrupted: why the run stopped before its end.
    """
    now = time.time()
    with registry.reading() as session:
        steps = [*nightly.list_steps(session, run.id), *deleted]
        evaluated = _evaluated_runs(session, run, {step.adapter for step in steps})
        found = _jobs(session, steps)
        records = RunRecords(
            run=run,
            steps=steps,
            reported_at=now,
            jobs=found,
            metrics={job: history.metrics(session, job) for job in found},
            intervals=[each for job in found.values() for each in _intervals(session, job, settings.jobs, now)],
            set_aside=nightly.list_set_aside(session),
            rollouts=rollouts_around(session, run, now),
            device="gpu" if settings.jobs.on_gpu else "cpu",
            interrupted=interrupted,
            gateway=settings.gateway if settings.url or settings.address_file.exists() else None,
        )
    # Outside of the transaction: an artifact store may be slow.
    scores = {adapter: _scores(registry.artifacts, runs) for adapter, runs in evaluated.items() if len(runs) > 1}
    return replace(records, scores=scores)


def _evaluated_runs(
    session: Session, run: NightlyRun, adapters: Collection[str]
) -> dict[str, list[tuple[NightlyRun, list[NightlyStep]]]]:
    """The last runs in which each of these adapters was evaluated, this one included, with its steps; oldest first."""
    found: dict[str, list[tuple[NightlyRun, list[NightlyStep]]]] = {adapter: [] for adapter in adapters}
    runs = [each for each in nightly.list_runs(session, _SEARCHED_RUNS) if each.created_at <= run.created_at]
    for each in runs:  # newest first
        for adapter, steps in groupby(sorted(nightly.list_steps(session, each.id), key=_adapter), key=_adapter):
            own = list(steps)
            wanted = adapter in found and len(found[adapter]) < _SHOWN_RUNS
            if wanted and results_by_stage(own).get("evaluate", {}).get("results"):
                found[adapter].insert(0, (each, own))
    return found


def _adapter(step: NightlyStep) -> str:
    return step.adapter


def _scores(artifacts: ArtifactStore, runs: Sequence[tuple[NightlyRun, list[NightlyStep]]]) -> list[RunScores]:
    """The scores of the versions that answered after each run; a run whose results were deleted is left out."""
    found = []
    for run, steps in runs:
        done = results_by_stage(steps)
        with suppress(ArtifactError):
            results = evaluations.read_results(artifacts, done["evaluate"]["results"])
            promoted = done.get("promote", {}).get("champion") == done.get("train", {}).get("version")
            found.append(_run_scores(run, results, metric_of(done), "challenger" if promoted else "champion"))
    return found


def _run_scores(run: NightlyRun, results: Sequence[ExampleResult], metric: str, candidate: Candidate) -> RunScores:
    own = [each for each in results if each.candidate == candidate and metric in each.scores]
    new = [each for each in own if any(slice_kind(name) == "new" and name != GOLDEN_SLICE for name in each.slices)]
    return RunScores(
        run=run.id,
        at=run.created_at,
        new=frozenset(each.example for each in new),
        scores={each.example: each.scores[metric] for each in own},
    )


def _jobs(session: Session, steps: Sequence[NightlyStep]) -> Mapping[str, JobRecord]:
    """The jobs that the steps name, without those that were deleted."""
    found = {}
    named = (job for step in steps if step.step == "train" for job in planned_tokens(step.result))
    for job in dict.fromkeys(named):
        try:
            found[job] = jobs.get(session, job)
        except NotFound:
            continue
    return found


def _intervals(session: Session, job: JobRecord, settings: JobSettings, now: float) -> list[JobInterval]:
    """When sessions held a job; a job with its own trainer has whole GPUs."""
    if not settings.on_gpu:
        devices = float(settings.threads)
    elif job.executor == "dedicated":
        devices = float(job.spec.gpus)
    else:
        devices = settings.gpu_share
    return [
        JobInterval(job.id, each.owner, each.started_at, each.ended_at, devices)
        for each in history.attempts(session, job.id, now=now)
    ]
