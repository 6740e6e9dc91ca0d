"""A sweep of eight candidates, compared with eight whole trainings, on real tenants' data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.orm import Session

from loramill.data.examples import read_examples
from loramill.errors import InvalidRequest, JobError
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import Worker
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry, datasets, jobs, migrate, tenants
from loramill.registry.jobs import checkpoints
from loramill.settings import Settings
from loramill.submission.defaults import resolve_spec
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.submission.sweep import candidate_requests, combine
from loramill.types import DatasetRecord, JobRecord, JobSpec, JobStatus
from loramill_bench.results import Result, run_groups
from loramill_bench.training.worker import bench_worker

#: Of different kinds, with short examples: intents, spoken commands, pronunciations, and dialogs with a state.
TENANTS = ("clinc-travel", "hwu-play", "cmudict-g2p", "sgd-weather1")
#: The candidates: the default learning rate and rank are among them.
SWEEP: dict[str, list[Any]] = {"learning_rate": [1e-4, 3e-4, 1e-3, 3e-3], "rank": [8, 32]}
#: Most that a sweep may cost, of all whole trainings, and most that the loss it finds may be above the lowest.
COST, LOSS = 0.45, 1.01


def run(
    base: Base, folder: Path, only: str = "", report: Callable[[str], object] = lambda group: None, *, steps: int
) -> list[Result]:
    """Trains each tenant's candidates as a sweep, and then all of them to the end, both in one session.

    Args:
        base: The trained base, in bfloat16.
        folder: A folder with one folder per tenant, which contains train.jsonl and valid.jsonl.
        only: Runs only tenants whose name contains this.
        report: Called with the name of each tenant before it runs.
        steps: Optimizer steps of a whole training; other options are the defaults.

    Raises:
        InvalidRequest: No tenant's name contains `only`, or a file is missing.
        JobError: A job failed.
    """
    missing = [f"{tenant}/valid.jsonl" for tenant in TENANTS if not (folder / tenant / "valid.jsonl").is_file()]
    if missing:
        raise InvalidRequest(f"{folder} has no {', '.join(missing)}: name the folder that has.", param="tenants")
    torch.set_num_threads(1)
    groups = {f"sweep {tenant}": partial(_measure, base, folder / tenant, steps) for tenant in TENANTS}
    return run_groups(groups, only, report)


def _measure(base: Base, data: Path, steps: int) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as home:
        settings = Settings.load(home=Path(home), database_url=None, artifacts_url=None)
        migrate(settings.database)
        registry = Registry.open(settings.database, settings.artifacts)
        candidates = prod(map(len, SWEEP.values()))
        own = settings.jobs.model_copy(update={"per_session": candidates})
        worker = replace(bench_worker(base, registry, settings), settings=own)
        spec = _sweep_spec(registry, base, data, steps)
        (sweep,), swept_seconds = _train(worker, [spec])
        whole, whole_seconds = _train(worker, spec.trained_specs)
        losses = sorted(_lowest_loss(registry, job) for job in whole)
        registry.close()
    best = next(each for each in sweep.sweep if each.state == "best")
    tokens = sweep.trained_tokens / sum(job.trained_tokens for job in whole)
    found = (best.best_valid_loss or 0.0) / losses[0]
    name = f"sweep {data.name}, {len(whole)} x {steps} steps"
    return [
        Result(f"{name}: tokens", tokens, "of whole trainings", COST),
        Result(f"{name}: CPU time", swept_seconds / whole_seconds, "of whole trainings", COST),
        Result(f"{name}: validation loss", found, "of the lowest", LOSS),
        Result(f"{name}: lowest validation loss", losses[0], "nats"),
        Result(f"{name}: validation loss of the median candidate", losses[len(losses) // 2], "nats"),
    ]


def _sweep_spec(registry: Registry, base: Base, data: Path, steps: int) -> JobSpec:
    """The spec of the sweep as the gateway makes it, with the tenant's data in the registry."""
    with registry.writing() as session:
        tenants.create(session, "bench")
        train, valid = (_dataset(registry, session, data / f"{name}.jsonl") for name in ("train", "valid"))
    options = LoramillOptions(steps=steps, sweep=SWEEP)
    request = JobRequest(AdapterName("bench", data.name), train.id, valid.id, options=options)
    return combine([resolve_spec(each, base, train.examples) for each in candidate_requests(request)])


def _dataset(registry: Registry, session: Session, file: Path) -> DatasetRecord:
    raw = file.read_bytes()
    artifact = registry.artifacts.put({"data.jsonl": raw})
    examples = len(read_examples(raw, file.name).examples)
    return datasets.create(session, "bench", file.name, artifact, len(raw), examples)


def _train(worker: Worker, specs: Sequence[JobSpec]) -> tuple[list[JobRecord], float]:
    """Trains jobs in one session; returns them with the CPU seconds.

    Raises:
        JobError: One failed.
    """
    with worker.registry.writing() as session:
        queued = [jobs.submit(session, spec, {}, cost=1.0) for spec in specs]

    def now() -> list[JobRecord]:
        with worker.registry.reading() as session:
            return [jobs.get(session, job.id) for job in queued]

    began = time.process_time()
    run_jobs(worker, should_stop=lambda idle: all(job.status.final for job in now()))
    seconds = time.process_time() - began
    for job in now():
        if job.status is not JobStatus.SUCCEEDED:
            raise JobError(f"{job.spec.adapter}: {job.error_message}")
    return now(), seconds


def _lowest_loss(registry: Registry, job: JobRecord) -> float:
    with registry.reading() as session:
        return min(each.metrics["valid_loss"] for each in checkpoints.list_checkpoints(session, job.id, limit=1000))
