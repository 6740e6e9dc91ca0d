"""The trainings of `loramill-bench quality`, each with a job's default options, and the targets of their scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

from loramill.errors import InvalidRequest, JobError
from loramill.models.smollm2 import NAME
from loramill.pipelines.compare.run import run_task
from loramill.pipelines.compare.types import TITLES, Task, Tuning
from loramill.settings import Settings
from loramill_bench.quality.preferences import tune_and_score
from loramill_bench.quality.together import train_and_score
from loramill_bench.results import Result, run_groups

Metric = Literal["exact_match", "rouge_l"]

#: Metric and target of LoRA on each tenant's test questions.
TARGETS: dict[str, tuple[Metric, float]] = {
    "clinc-travel": ("exact_match", 0.90),
    "clinc-banking": ("exact_match", 0.90),
    "sgd-hotels1": ("exact_match", 0.50),
    "e2e-restaurants": ("rouge_l", 0.38),
}
#: Percentage points by which other methods may be worse than LoRA.
ALLOWED_LOSS_POINTS: dict[Tuning, float] = {"qlora": 3, "dora": 2, "adalora": 2}
#: Tenants whose adapters are trained with DPO, too.
PREFERENCE_TENANTS = ("clinc-travel", "clinc-banking")
#: The lowest acceptable reward accuracy on held-out pairs, and the percentage points of exact match that DPO may cost.
REWARD_ACCURACY, ALLOWED_LOSS_BY_DPO = 0.9, 2
_FILES = ("train", "valid", "test")

Score = Callable[[str, Tuning], float]


def run(tenants: Path, settings: Settings, only: str, report: Callable[[str], object]) -> list[Result]:
    """Trains on the built-in base with a job's default options, and scores the answers to the test questions.

    Args:
        tenants: A folder with one folder per tenant, which contains train.jsonl, valid.jsonl and test.jsonl.
        settings: The settings; cache and threads are used.
        only: Runs only groups whose name (such as `clinc-travel qlora`) contains this. LoRA is also trained if another
            method is compared with it.
        report: Called with the name of each group before it runs.

    Raises:
        InvalidRequest: No group's name contains `only`, or a file is missing.
        JobError: A training failed.
    """
    missing = [
        f"{name}/{file}.jsonl"
        for name in TARGETS
        for file in _FILES
        if not (tenants / name / f"{file}.jsonl").is_file()
    ]
    if missing:
        raise InvalidRequest(f"{tenants} has no {', '.join(missing)}: name the folder that has.", param="tenants")
    with tempfile.TemporaryDirectory(prefix="loramill-quality-") as folder:
        score = cache(partial(_score, tenants, Path(folder), settings))
        groups = {
            f"{tenant} {method}": partial(_results, score, tenant, method)
            for tenant in TARGETS
            for method in ("lora", *ALLOWED_LOSS_POINTS)
        }
        groups["together"] = partial(_results_together, tenants, Path(folder), settings, report)
        groups |= {
            f"{tenant} preferences": partial(_results_of_preferences, tenants, Path(folder), settings, tenant, report)
            for tenant in PREFERENCE_TENANTS
        }
        return run_groups(groups, only, report)


def _results(score: Score, tenant: str, method: Tuning) -> list[Result]:
    metric, target = TARGETS[tenant]
    case, value = f"{tenant} {method}: {metric.replace('_', ' ')}", score(tenant, method)
    if method == "lora":
        return [Result(case, value, "score", target, "higher")]
    points = 100 * (value - score(tenant, "lora"))
    return [
        Result(case, value, "score"),
        Result(f"{tenant} {method}: above LoRA", points, "points", -ALLOWED_LOSS_POINTS[method], "higher"),
    ]


def _results_together(tenants: Path, folder: Path, settings: Settings, report: Callable[[str], object]) -> list[Result]:
    """All tenants' adapters, trained by shared passes."""
    tasks = {tenant: _task(tenants, folder / "together", settings, tenant, "lora") for tenant in TARGETS}
    for task in tasks.values():
        task.folder.mkdir(parents=True)
    scores = train_and_score(tasks, report)
    return [
        Result(
            f"{tenant} together: {metric.replace('_', ' ')}", getattr(scores[tenant], metric), "score", target, "higher"
        )
        for tenant, (metric, target) in TARGETS.items()
    ]


def _results_of_preferences(
    tenants: Path, folder: Path, settings: Settings, tenant: str, report: Callable[[str], object]
) -> list[Result]:
    """DPO that continues the adapter of supervised training."""
    task = _task(tenants, folder / "preferences", settings, tenant, "lora")
    task.folder.mkdir(parents=True)
    scores = tune_and_score(task, report)
    # 0.94 - 0.96 is a little less than -0.02 in floating point, and would miss a target of -2 points.
    points = round(100 * (scores.preferred - scores.supervised), 9)
    return [
        Result(f"{tenant} preferences: reward accuracy", scores.reward_accuracy, "of pairs", REWARD_ACCURACY, "higher"),
        Result(f"{tenant} preferences: exact match", scores.preferred, "of questions"),
        Result(f"{tenant} preferences: above supervised", points, "points", -ALLOWED_LOSS_BY_DPO, "higher"),
    ]


def _score(tenants: Path, folder: Path, settings: Settings, tenant: str, method: Tuning) -> float:
    """Trains with a method, and returns its score on the tenant's test questions."""
    row = run_task(_task(tenants, folder, settings, tenant, method))
    if row.quality is None:
        raise JobError(f"{TITLES[method]} on {tenant}: {row.error}")
    score: float = getattr(row.quality, TARGETS[tenant][0])
    return score


def _task(tenants: Path, folder: Path, settings: Settings, tenant: str, method: Tuning) -> Task:
    train, valid, test = (tenants / tenant / f"{file}.jsonl" for file in _FILES)
    return Task(
        subject=method,
        base=NAME,
        cache=settings.cache,
        train=train,
        valid=valid,
        test=test,
        folder=folder / tenant / method,
        threads=settings.jobs.threads,
        serving=False,
    )
