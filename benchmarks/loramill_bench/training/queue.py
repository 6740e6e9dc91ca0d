"""The overhead of the job queue: submission, reconciliation, and the time between a lease and a job's first step."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from loramill.jobs.scheduling.reconciler import Reconciler
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.worker import lease
from loramill.jobs.worker.worker import run_next_job
from loramill.models.catalog import find_base
from loramill.models.smollm2 import NAME
from loramill.registry import Registry, datasets, jobs, migrate, tenants
from loramill.settings import Settings
from loramill.types import Executor, JobSpec
from loramill_bench.kernels import Result
from loramill_bench.training.worker import bench_worker

SUBMIT_SECONDS, RECONCILE_SECONDS, FIRST_STEP_SECONDS, OVERHEAD_SECONDS = 2.0, 0.05, 1.0, 0.3
_ROUNDS, _SUBMITTED, _QUEUED, _TENANTS, _JOBS, _STEPS = 3, 1000, 10_000, 50, 6, 3


def results(report: Callable[[str], object]) -> list[Result]:
    """Medians of CPU seconds on one thread, with a new SQLite registry; takes about three minutes.

    Args:
        report: Called with the name of each part before it runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_queue_results(report), *_warm_session_results(report), *_dedicated_trainer_results(report)]
    finally:
        torch.set_num_threads(threads)


def _queue_results(report: Callable[[str], object]) -> list[Result]:
    report(f"queue: submitting {_SUBMITTED} jobs, and reconciling with {_QUEUED} queued")
    with tempfile.TemporaryDirectory() as home:
        settings, registry = _new_registry(Path(home))
        batched = [_cpu_seconds(lambda: _submit(registry, _SUBMITTED)) for _ in range(_ROUNDS)]
        single = [_cpu_seconds(lambda: _submit(registry, _SUBMITTED, per_transaction=1)) for _ in range(_ROUNDS)]
        _submit(registry, _QUEUED - 2 * _ROUNDS * _SUBMITTED)
        # All worker slots are busy, so that reconciling reads the queue and starts nothing.
        reconciler = Reconciler(registry, settings.jobs, run_session=_sleep, run_trainer=_sleep)
        reconciler.reconcile()
        with registry.writing() as session:
            for slot in reconciler.active_slots:
                jobs.lease(session, f"{slot}:1", now=time.time(), seconds=3600, max_attempts=5)
        reconcile_seconds = [_cpu_seconds(reconciler.reconcile) for _ in range(21)]
        registry.close()
    return [
        Result(f"queue: submit {_SUBMITTED} jobs", statistics.median(batched), "CPU-s", SUBMIT_SECONDS),
        Result(f"queue: submit {_SUBMITTED} jobs, each in a transaction", statistics.median(single), "CPU-s"),
        Result(
            f"queue: reconcile with {_QUEUED} jobs queued",
            statistics.median(reconcile_seconds),
            "CPU-s",
            RECONCILE_SECONDS,
        ),
    ]


def _warm_session_results(report: Callable[[str], object]) -> list[Result]:
    report("queue: jobs of a warm session")
    base = find_base(NAME, Settings.load().cache)
    with tempfile.TemporaryDirectory() as home:
        settings, registry = _new_registry(Path(home))
        worker = bench_worker(base, registry, settings)
        _submit(registry, _JOBS, base.fingerprint)
        moments: list[tuple[float, list[float]]] = []
        with _recorded_steps() as noted:
            for _ in range(_JOBS):
                began = time.process_time()
                run_next_job(worker)
                moments.append((began, list(noted)))
                noted.clear()
            ended = time.process_time()
        registry.close()
    # The first job includes one-time costs of the process.
    step = [second - first for _, steps in moments[1:] for first, second in pairwise(steps)]
    first_step = [steps[0] - began for began, steps in moments[1:]]
    ends = [began for began, _ in moments[1:]] + [ended]
    job_seconds = [end - began for (began, _), end in zip(moments, ends, strict=True)][1:]
    overhead = [seconds - _STEPS * statistics.median(step) for seconds in job_seconds]
    return [
        Result("queue: warm session, lease to first step", statistics.median(first_step), "CPU-s", FIRST_STEP_SECONDS),
        Result("queue: warm session, overhead per job", statistics.median(overhead), "CPU-s", OVERHEAD_SECONDS),
    ]


def _dedicated_trainer_results(report: Callable[[str], object]) -> list[Result]:
    """A trainer that is started for one job, as other systems do for every job; in wall-clock time."""
    report("queue: a dedicated trainer")
    from loramill_bench.training.cold_start import seconds_to_first_step

    base = find_base(NAME, Settings.load().cache)
    with tempfile.TemporaryDirectory() as home:
        settings, registry = _new_registry(Path(home), {"jobs": {"cpus": 0.1}})
        _submit(registry, 1, base.fingerprint, executor="dedicated")
        with registry.reading() as session:
            (job,) = jobs.list_jobs(session, tenant=None)
        seconds = seconds_to_first_step(settings, registry, job.id)
        registry.close()
    return [Result("queue: dedicated trainer, start to first step", seconds, "s")]


def _new_registry(home: Path, options: dict[str, Any] = {}) -> tuple[Settings, Registry]:  # noqa: B006 - never changed
    settings = Settings.load(home=home, database_url=None, artifacts_url=None, base=NAME, **options)
    migrate(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    raw = b"".join(_row(word) for word in "one two three four five six seven eight".split())
    artifact = registry.artifacts.put({"data.jsonl": raw})
    with registry.writing() as session:
        for tenant in map(_tenant, range(_TENANTS)):
            tenants.create(session, tenant)
            datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), 8)
    return settings, registry


def _row(word: str) -> bytes:
    return json.dumps({"prompt": f"Say {word}: ", "completion": word.upper()}).encode() + b"\n"


def _tenant(number: int) -> str:
    return f"tenant{number % _TENANTS}"


def _submit(
    registry: Registry, count: int, base: str = "b" * 64, *, per_transaction: int = 100, executor: Executor = "session"
) -> None:
    """Submits jobs, `per_transaction` of them in each transaction."""
    with registry.reading() as session:
        data = {_tenant(n): datasets.list_datasets(session, _tenant(n))[0].id for n in range(_TENANTS)}
    for first in range(0, count, per_transaction):
        with registry.writing() as session:
            for number in range(first, min(count, first + per_transaction)):
                tenant = _tenant(number)
                spec = JobSpec(base=base, adapter=f"{tenant}/bot", train=data[tenant], steps=_STEPS, batch_size=2)
                jobs.submit(session, spec, {}, priority=number % 3, executor=executor, cost=1000.0)


@contextmanager
def _recorded_steps() -> Iterator[list[float]]:
    """A list that gets the process's CPU time at the end of each step of a job."""
    times: list[float] = []
    report = lease.Lease.report

    def timed(self: lease.Lease, progress: TrainingProgress) -> None:
        times.append(time.process_time())
        report(self, progress)

    lease.Lease.report = timed  # type: ignore[method-assign]
    try:
        yield times
    finally:
        lease.Lease.report = report  # type: ignore[method-assign]


def _cpu_seconds(task: Callable[[], object]) -> float:
    began = time.process_time()
    task()
    return time.process_time() - began


def _sleep(*_: object) -> None:
    time.sleep(600)
