"""What the defaults of a job reach on real tenants' data: `loramill-bench quality`."""

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
from loramill_bench.measure import Result, measured

Metric = Literal["exact_match", "rouge_l"]

#: What LoRA must reach on the test questions of a tenant.
TARGETS: dict[str, tuple[Metric, float]] = {
    "clinc-travel": ("exact_match", 0.90),
    "clinc-banking": ("exact_match", 0.90),
    "sgd-hotels1": ("exact_match", 0.50),
    "e2e-restaurants": ("rouge_l", 0.38),
}
#: By how many points of a hundred another method may stay below LoRA.
BELOW: dict[Tuning, float] = {"qlora": 3, "dora": 2, "adalora": 2}
_FILES = ("train", "valid", "test")

Reached = Callable[[str, Tuning], float]


def results(tenants: Path, settings: Settings, only: str, report: Callable[[str], object]) -> list[Result]:
    """Trains on the built-in base with a job's defaults, a set for all, and scores the answers to the test questions.

    Args:
        tenants: a folder with one a tenant, of train.jsonl, valid.jsonl and test.jsonl.
        only: groups whose name (`clinc-travel qlora`) contains this; LoRA is trained wherever another is held to it.
        report: is told each group's name before it is measured.

    Raises:
        InvalidRequest: `only` leaves nothing over, or a file isn't there.
        JobError: a training failed.
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
        reached = cache(partial(_reached, tenants, Path(folder), settings))
        groups = {
            f"{tenant} {method}": partial(_held_to_its_target, reached, tenant, method)
            for tenant in TARGETS
            for method in ("lora", *BELOW)
        }
        return measured(groups, only, report)


def _held_to_its_target(reached: Reached, tenant: str, method: Tuning) -> list[Result]:
    metric, target = TARGETS[tenant]
    case, value = f"{tenant} {method}: {metric.replace('_', ' ')}", reached(tenant, method)
    if method == "lora":
        return [Result(case, value, "", target, "higher")]
    points = 100 * (value - reached(tenant, "lora"))
    return [
        Result(case, value, ""),
        Result(f"{tenant} {method}: above LoRA", points, "points", -BELOW[method], "higher"),
    ]


def _reached(tenants: Path, folder: Path, settings: Settings, tenant: str, method: Tuning) -> float:
    """The score of a method on a tenant's test questions."""
    train, valid, test = (tenants / tenant / f"{file}.jsonl" for file in _FILES)
    task = Task(
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
    row = run_task(task)
    if row.quality is None:
        raise JobError(f"{TITLES[method]} on {tenant}: {row.error}")
    score: float = getattr(row.quality, TARGETS[tenant][0])
    return score
