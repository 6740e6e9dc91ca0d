"""Summarizes what the registry has about a nightly run as one report. A pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal

from loramill.errors import first_lines
from loramill.names import SHORT_HASH_LENGTH
from loramill.pipelines.nightly.outcome import Outcome, Verdict, metric_of, outcomes, succeeded, summary
from loramill.pipelines.nightly.report.cost import JobInterval, shared_seconds
from loramill.pipelines.nightly.report.forgetting import RunScores, slice_histories
from loramill.pipelines.nightly.report.recorded import (
    main_gain,
    number,
    overall_score,
    reported_gains,
    reported_scores,
    results_by_stage,
)
from loramill.pipelines.nightly.report.schema import (
    AdapterReport,
    EarlierFailure,
    LossPoint,
    NightlyReport,
    ReportedCost,
    ReportedQuarantine,
    ReportedTraining,
    ReportLink,
    ReportTotals,
)
from loramill.pipelines.nightly.rollouts.overview import RolloutOverview
from loramill.pipelines.nightly.training.recorded import planned_tokens
from loramill.types import JobRecord, NightlyRun, NightlyStep, SetAsideData

#: Where the documentation of the gateway sends the request that approves.
APPROVAL_PAGE = "/docs#/adapters/decide_approval_v1_adapters__tenant___adapter__approval_post"
#: Points of a curve: on a page of 420 units more would be on top of each other.
CURVE_POINTS = 120
#: Problems first, then changes; verdicts that are not listed come after these.
_ORDER = (
    Verdict.FAILED,
    Verdict.INTERRUPTED,
    Verdict.AWAITING,
    Verdict.REJECTED,
    Verdict.HELD,
    Verdict.PROMOTED,
    Verdict.RUNNING,
)


@dataclass(frozen=True, slots=True)
class RunRecords:
    """What the registry has about a run.

    Attributes:
        steps: of all its adapters, with those of adapters that were deleted during the run.
        jobs: by ID; a job that was deleted is missing.
        metrics: the recorded losses of each job, by ID.
        intervals: when sessions and trainers held these jobs.
        set_aside: data of all runs that waits after a failure.
        scores: scores per example of this run and earlier ones, by adapter, in order of time.
        rollouts: those of the run, and those around it.
        device: what the jobs trained on.
        interrupted: why the run stopped before its end.
        gateway: URL of the gateway, if it is known.
    """

    run: NightlyRun
    steps: Sequence[NightlyStep]
    reported_at: float
    jobs: Mapping[str, JobRecord] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    intervals: Sequence[JobInterval] = ()
    set_aside: Sequence[SetAsideData] = ()
    scores: Mapping[str, Sequence[RunScores]] = field(default_factory=dict)
    rollouts: Sequence[RolloutOverview] = ()
    device: Literal["gpu", "cpu"] | None = None
    interrupted: str | None = None
    gateway: str | None = None


def summarize(records: RunRecords) -> NightlyReport:
    """The report of a run; what the records lack is absent from it."""
    found = outcomes(records.steps)
    by_adapter = {
        adapter: list(steps)
        for adapter, steps in groupby(sorted(records.steps, key=attrgetter("adapter")), key=attrgetter("adapter"))
    }
    seconds = shared_seconds(records.intervals)
    adapters = sorted(
        (_adapter(records, outcome, by_adapter[outcome.adapter], seconds) for outcome in found),
        key=lambda each: (_rank(each.verdict), each.adapter),
    )
    return NightlyReport(
        run=records.run.id,
        started_at=records.run.created_at,
        finished_at=records.run.finished_at,
        reported_at=records.reported_at,
        succeeded=succeeded(found) and records.interrupted is None,
        summary=summary(found),
        interrupted=records.interrupted,
        totals=_totals(records, adapters),
        adapters=tuple(adapters),
        rollouts=tuple(records.rollouts),
        set_aside=tuple(
            EarlierFailure(adapter=each.adapter, run=each.run, stage=each.stage, reason=first_lines(each.reason))
            for each in records.set_aside
            if each.run != records.run.id
        ),
    )


def _adapter(
    records: RunRecords, outcome: Outcome, steps: Sequence[NightlyStep], seconds: Mapping[str, float]
) -> AdapterReport:
    done, every = results_by_stage(steps), results_by_stage(steps, done=False)
    evaluated, gate = done.get("evaluate", {}), done.get("gate", {})
    collected, trained = every.get("collect", {}), every.get("train", {})
    metric = metric_of(done)
    scores = reported_scores(evaluated, metric)
    gains = reported_gains(gate)
    promotion = done.get("promote", {})
    version, now = trained.get("version"), promotion.get("champion")
    challenger, champion = (overall_score(scores, role) for role in ("challenger", "champion"))
    job = records.jobs.get(str(trained.get("job")))
    return AdapterReport(
        adapter=outcome.adapter,
        verdict=outcome.verdict,
        stage=outcome.stage,
        reason=outcome.reason,
        metric=metric,
        before=champion,
        after=(challenger if now == version else champion) if now else None,
        challenger=challenger,
        base=overall_score(scores, "base"),
        gain=main_gain(gains),
        old_champion=collected.get("champion"),
        version=version,
        champion=now,
        scores=scores,
        gains=gains,
        choice=trained.get("choice") or None,
        training=_training(job, records.metrics.get(job.id, ())) if job else None,
        rows=_rows(outcome),
        replay=collected.get("replay", {}),
        quarantine=_quarantine(outcome),
        history=slice_histories(records.scores.get(outcome.adapter, ())),
        cost=_cost(
            records,
            [records.jobs[each] for each in planned_tokens(trained) if each in records.jobs],
            evaluated,
            seconds,
        ),
        links=tuple(_links(records, outcome, every, job)),
    )


def _rows(outcome: Outcome) -> dict[str, int]:
    """What became of the rows; empty if they were not counted."""
    counts: dict[str, int] = outcome.counts.model_dump()
    return counts if any(counts.values()) else {}


def _quarantine(outcome: Outcome) -> ReportedQuarantine | None:
    rows = outcome.counts.quarantined
    return ReportedQuarantine(rows=rows, file=outcome.quarantine, reasons=outcome.quarantined) if rows else None


def _training(job: JobRecord, metrics: Sequence[Mapping[str, Any]]) -> ReportedTraining:
    return ReportedTraining(
        job=job.id,
        status=job.status,
        steps=job.step,
        planned_steps=job.spec.steps,
        tokens=job.trained_tokens,
        seconds=max(0.0, job.finished_at - job.started_at) if job.finished_at and job.started_at else None,
        train_loss=number(job.loss),
        valid_loss=number(job.valid_loss),
        curve=_curve(metrics),
    )


def _curve(metrics: Sequence[Mapping[str, Any]]) -> tuple[LossPoint, ...]:
    """The losses by step; of many steps, those with a validation loss, the last one, and an even choice of others."""
    points = [
        LossPoint(step=int(each["step"]), train=number(each.get("train_loss")), valid=number(each.get("valid_loss")))
        for each in metrics
        if "step" in each
    ]
    points = [each for each in points if each.train is not None or each.valid is not None]
    validated = [each for each in points if each.valid is not None]
    others = [each for each in points if each.valid is None]
    chosen = _thinned(validated, CURVE_POINTS // 2)
    return tuple(sorted(chosen + _thinned(others, CURVE_POINTS - len(chosen)), key=attrgetter("step")))


def _thinned(points: list[LossPoint], most: int) -> list[LossPoint]:
    """At most `most` of these points, evenly chosen, with the first and the last."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _cost(
    records: RunRecords, jobs: Sequence[JobRecord], evaluated: Mapping[str, Any], seconds: Mapping[str, float]
) -> ReportedCost:
    answers, tokens = number(evaluated.get("answers")), number(evaluated.get("tokens_answered"))
    return ReportedCost(
        device=records.device,
        device_seconds=sum((seconds.get(job.id, 0.0) for job in jobs), 0.0),
        tokens_trained=sum(job.trained_tokens for job in jobs),
        answers=None if answers is None else int(answers),
        tokens_answered=None if tokens is None else int(tokens),
    )


def _links(
    records: RunRecords, outcome: Outcome, results: Mapping[str, Mapping[str, Any]], job: JobRecord | None
) -> Iterable[ReportLink]:
    name, version = outcome.adapter, results.get("train", {}).get("version")
    if outcome.verdict is Verdict.DELETED:
        return
    if outcome.verdict is Verdict.AWAITING:
        page = None if records.gateway is None else records.gateway + APPROVAL_PAGE
        approve = f"loramill nightly approve {records.run.id} {name}"
        yield ReportLink(name="Approve it", command=approve, url=page)
        yield ReportLink(name="Reject it", command=f"{approve} --reject", url=page)
    yield ReportLink(name="Versions and evaluations", command=f"loramill adapters show {name}")
    if job is not None:
        yield ReportLink(name="Job", command=f"loramill jobs show {job.id}")
    if outcome.verdict is Verdict.PROMOTED:
        yield ReportLink(name="Roll back to the version before", command=f"loramill rollback {name}")
    elif outcome.verdict in (Verdict.CANARY, Verdict.SHADOW):
        yield ReportLink(name="Promote it now", command=f"loramill promote {name}@challenger")
        yield ReportLink(name="End the canary", command=f"loramill adapters canary {name} --end")
    elif version and results.get("gate") and outcome.verdict is not Verdict.AWAITING:
        command = f"loramill promote {name}@{str(version)[:SHORT_HASH_LENGTH]}"
        yield ReportLink(name="Promote it all the same", command=command)
    if any(each.get("data") == "set aside" for each in results.values()):
        yield ReportLink(name="Use the data in the next run again", command=f"loramill nightly retry {name}")
        yield ReportLink(name="Discard the data", command=f"loramill nightly drop {name}")
    if outcome.quarantine:
        yield ReportLink(name="Quarantined rows", command=f"loramill files show {outcome.quarantine} --content")


def _totals(records: RunRecords, adapters: Sequence[AdapterReport]) -> ReportTotals:
    verdicts = Counter(each.verdict for each in adapters)
    rows: Counter[str] = Counter()
    for each in adapters:
        rows.update(each.rows)
    costs = [each.cost for each in adapters]
    return ReportTotals(
        adapters=len(adapters),
        verdicts={verdict: verdicts[verdict] for verdict in sorted(verdicts, key=_rank)},
        rows=dict(rows),
        quarantined=sum(each.quarantine.rows for each in adapters if each.quarantine),
        cost=ReportedCost(
            device=records.device,
            device_seconds=sum(each.device_seconds for each in costs),
            tokens_trained=sum(each.tokens_trained for each in costs),
            answers=_sum_known(each.answers for each in costs),
            tokens_answered=_sum_known(each.tokens_answered for each in costs),
        ),
    )


def _sum_known(numbers: Iterable[int | None]) -> int | None:
    known = [each for each in numbers if each is not None]
    return sum(known) if known else None


def _rank(verdict: Verdict) -> tuple[int, str]:
    return (_ORDER.index(verdict) if verdict in _ORDER else len(_ORDER)), verdict
