"""Records of nightly runs for the tests of their reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramill.pipelines.nightly.report.cost import JobInterval
from loramill.pipelines.nightly.report.forgetting import RunScores
from loramill.pipelines.nightly.report.summarize import RunRecords
from loramill.pipelines.nightly.rollouts.overview import RolloutOverview, VersionSignals
from loramill.types import JobRecord, JobSpec, JobStatus, NightlyRun, NightlyStep, RolloutKind, SetAsideData, StepStatus

RUN = NightlyRun(id="nightly-1", created_at=1_796_000_000.0, finished_at=1_796_004_000.0)
OLD, NEW = "a" * 64, "b" * 64
STAGES = ("collect", "train", "evaluate", "gate", "promote")


def step(adapter: str, stage: str, result: Mapping[str, Any], status: StepStatus = StepStatus.DONE) -> NightlyStep:
    return NightlyStep(run=RUN.id, adapter=adapter, step=stage, status=status, result=dict(result))


def score(value: float, examples: int = 40) -> dict[str, float]:
    return {"examples": examples, "exact_match": value / 2, "token_f1": value, "rouge_l": value}


def evidence(gain: float, name: str = "new", against: str = "champion", width: float = 0.05) -> dict[str, Any]:
    numbers = {"gain": gain, "low": gain - width, "high": gain + width, "p_better": 0.01, "p_worse": 0.99}
    return {"name": name, "against": against, "examples": 40, "wins": 9, "losses": 2, **numbers}


def complete(
    adapter: str, gain: float = 0.2, *, promote: bool = True, reason: str = "it gains 0.200"
) -> list[NightlyStep]:
    """The steps of an adapter that went through all stages."""
    slices = {
        "new": {"base": score(0.3), "champion": score(0.5), "challenger": score(0.5 + gain)},
        "before": {"base": score(0.2, 60), "champion": score(0.7, 60), "challenger": score(0.7, 60)},
        "new:topic=tax": {"champion": score(0.1, 10), "challenger": score(0.9, 10)},
    }
    counts = {"train": 200, "held_out": 40, "repeated": 3, "leaked": 0, "trained": 0, "quarantined": 2}
    quarantine = {
        "file": "file-9",
        "reasons": ["monday.jsonl, line 3: messages is empty.", "monday.jsonl, line 9: bad."],
    }
    collected = {"champion": OLD, "slices": {"new": "file-1"}, "counts": counts, "quarantine": quarantine}
    decision = {
        "verdict": "promote" if promote else "hold",
        "reason": reason,
        "evidence": [evidence(gain), evidence(0.01, "before"), evidence(0.3, "all examples", "base")],
    }
    results = {
        "collect": collected,
        "train": {"job": job_id(adapter), "version": NEW},
        "evaluate": {"slices": slices, "results": "c" * 64},
        "gate": decision,
        "promote": {"promoted": promote, "champion": NEW if promote else OLD, "verdict": decision["verdict"]},
    }
    return [step(adapter, stage, results[stage]) for stage in STAGES]


def awaiting(adapter: str, gain: float = 0.2) -> list[NightlyStep]:
    """The steps of an adapter whose challenger waits for a person."""
    *before, last = complete(adapter, gain)
    question = {"state": "pending", "decided_by": None, "note": "", "version": NEW, "champion": OLD}
    return [*before, step(adapter, "promote", last.result | {"promoted": False, "champion": OLD, "approval": question})]


def failed(adapter: str, error: str = "The loss is NaN.", stage: str = "train") -> list[NightlyStep]:
    """The steps of an adapter that failed in a stage, and whose data is set aside."""
    before = [each for each in complete(adapter) if STAGES.index(each.step) < STAGES.index(stage)]
    return [*before, step(adapter, stage, {"error": error, "data": "set aside"}, StepStatus.FAILED)]


def job_id(adapter: str) -> str:
    return f"ftjob-{adapter.replace('/', '-')}"


def job(adapter: str, **changes: Any) -> JobRecord:
    spec = JobSpec(base="base", adapter=adapter, train="file-1", steps=60, batch_size=8)
    fields = {
        "id": job_id(adapter),
        "tenant": adapter.partition("/")[0],
        "spec": spec,
        "status": JobStatus.SUCCEEDED,
        "step": 60,
        "trained_tokens": 12_000,
        "loss": 0.4,
        "valid_loss": 0.5,
        "created_at": RUN.created_at,
        "started_at": RUN.created_at + 60,
        "finished_at": RUN.created_at + 260,
    }
    return JobRecord(**(fields | changes))


def metrics(steps: int = 60) -> list[dict[str, float]]:
    points: list[dict[str, float]] = []
    for number in range(1, steps + 1):
        points.append({"step": number, "train_loss": 2.5 / number**0.5})
        if number % 10 == 0:
            points[-1]["valid_loss"] = 2.7 / number**0.45
    return points


def forgetting(runs: int = 4, loss: float = 0.02) -> list[RunScores]:
    """Scores of an adapter over several runs, each of which holds out ten examples and forgets older ones."""
    found = []
    for number in range(runs):
        scores = {
            f"{origin}-{index}": 0.9 - loss * (number - origin) - 0.1 * (index % 2)
            for origin in range(number + 1)
            for index in range(10)
        }
        new = frozenset(f"{number}-{index}" for index in range(10))
        found.append(RunScores(f"nightly-{number}", RUN.created_at - 86400 * (runs - 1 - number), new, scores))
    return found


def records(steps: Sequence[NightlyStep], **changes: Any) -> RunRecords:
    """Records of a run with a job, its metrics and its history for each adapter."""
    adapters = list(dict.fromkeys(each.adapter for each in steps))
    fields = {
        "run": RUN,
        "steps": steps,
        "reported_at": RUN.created_at + 5000,
        "jobs": {job_id(each): job(each) for each in adapters},
        "metrics": {job_id(each): metrics() for each in adapters},
        "intervals": [JobInterval(job_id(each), "session-1", 100.0, 300.0) for each in adapters],
        "scores": {each: forgetting() for each in adapters},
        "device": "cpu",
    }
    return RunRecords(**(fields | changes))


def aside(adapter: str, run: str = "nightly-0", reason: str = "The disk was full.") -> SetAsideData:
    return SetAsideData(adapter=adapter, run=run, stage="train", reason=reason, train=("file-1",), valid=())


def rollout(adapter: str, reason: str) -> RolloutOverview:
    """A watch that rolled a version back, of which 57 of 1,234 answers were empty."""
    tried = VersionSignals(version=NEW, requests=1_234, failed=0, empty=57, cut=0, good=1, bad=0, seconds=0.2)
    return RolloutOverview(
        adapter=adapter,
        kind=RolloutKind.WATCH,
        share=1.0,
        state="rolled back",
        reason=reason,
        run=None,
        started_at=1.0,
        ends_at=2.0,
        ended_at=1.5,
        tried=tried,
        compared=tried.model_copy(update={"version": OLD, "requests": 90, "empty": 0}),
    )
