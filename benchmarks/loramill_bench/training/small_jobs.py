"""Many small jobs on two sessions, each of which trains several jobs at once, or one after another.

As a script, a session: it prints a line once it has loaded the base, and starts when it reads one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loramill.jobs.scheduling.reconciler import may_take_another, worker_name
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.engine import Driver, TrainingEngine
from loramill.jobs.train.forward import configured_forward
from loramill.jobs.train.loop import TrainingRun, open_run
from loramill.jobs.worker.session import run_jobs
from loramill.models.catalog import find_base, load_for_training
from loramill.models.smollm2 import NAME
from loramill.registry import Registry, datasets, jobs, migrate, tenants
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings, Settings
from loramill.types import JobRecord, JobSpec, JobStatus
from loramill_bench.kernels import Result
from loramill_bench.training import session_memory
from loramill_bench.training.throughput import random_examples
from loramill_bench.training.worker import bench_worker

#: Jobs per hour of shared sessions over those of sessions of one job, and the time to the first result likewise.
JOBS_PER_HOUR, FIRST_RESULT = 1.4, 1.0
#: Memory of one session with eight jobs over that of eight sessions.
SESSION_MEMORY = 0.35
JOIN_SECONDS = 0.05
_JOBS, _TENANTS, _STEPS, _SESSIONS, _ROUNDS = 64, 16, 60, 2, 1
#: Seconds without a job after which a session of this benchmark ends.
_IDLE_SECONDS = 2.0
_HOLDER = "benchmark"


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the submission of all jobs to the first and to the last result."""

    first: float
    last: float


def results(report: Callable[[str], object], count: int = _JOBS, rounds: int = _ROUNDS) -> list[Result]:
    """Small jobs per hour in turns, the time that a job takes to join a session, and a session's memory.

    Args:
        report: called with the name of each part before it runs.
    """
    several: list[Times] = []
    single: list[Times] = []
    for number in range(rounds):
        report(f"small jobs, round {number + 1} of {rounds}")
        single.append(train_all(count, per_session=1))
        several.append(train_all(count, per_session=8))
    pairs = list(zip(single, several, strict=True))
    report("small jobs, memory and joining")
    one = session_memory.Mix("one job", session_memory.MIXES[0].jobs[:1])
    memory = session_memory.measure_peak(session_memory.MIXES[0]) / (8 * session_memory.measure_peak(one))
    return [
        Result(
            "small jobs: jobs per hour of shared sessions over sessions of one job",
            statistics.median(alone.last / shared.last for alone, shared in pairs),
            "x",
            JOBS_PER_HOUR,
            "higher",
        ),
        Result(
            "small jobs: time to the first result, of shared sessions over sessions of one job",
            statistics.median(shared.first / alone.first for alone, shared in pairs),
            "x",
            FIRST_RESULT,
        ),
        Result("small jobs: shared sessions", 3600 * count / min(each.last for each in several), "jobs/h"),
        Result("small jobs: memory of a session of 8 jobs over 8 sessions", memory, "x", SESSION_MEMORY),
        Result("small jobs: time that a session spends on a job that joins", join_seconds(), "CPU-s", JOIN_SECONDS),
    ]


def train_all(count: int, *, per_session: int) -> Times:
    """Trains the jobs in new sessions, whose start isn't counted."""
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as home, ExitStack() as stack:
        settings = Settings.load(
            home=Path(home),
            database_url=None,
            artifacts_url=None,
            base=NAME,
            jobs=JobSettings(sessions=_SESSIONS, per_session=per_session),
        )
        migrate(settings.database)
        registry = stack.enter_context(closing(Registry.open(settings.database, settings.artifacts)))
        names = [f"session-{number + 1}" for number in range(_SESSIONS)]
        with registry.writing() as session:
            for name in names:
                worker_slots.claim(session, name, _HOLDER, now=time.time(), seconds=3600)
        sessions = [_start_session(settings, name) for name in names]
        begun = time.time()
        queued = _submit(registry, count)
        for each in sessions:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        for each in sessions:
            each.communicate()
        with registry.reading() as session:
            ended = [jobs.get(session, job.id) for job in queued]
    assert all(each.returncode == 0 for each in sessions)
    assert all(job.status is JobStatus.SUCCEEDED for job in ended)
    seconds = sorted((job.finished_at or 0.0) - begun for job in ended)
    return Times(seconds[0], seconds[-1])


def join_seconds() -> float:
    """CPU time of a session's thread from a job's encoded data to its first part of a pass, next to seven jobs."""
    torch.set_num_threads(1)
    base = find_base(NAME, Settings.load().cache)
    model = load_for_training(base, torch.bfloat16)
    times = []
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as scratch, ExitStack() as stack:
        stack.enter_context(configured_forward(model, 1024))
        driver: Driver[TrainingProgress] = Driver(TrainingEngine(model), 1024)
        for number in range(8):
            context = TrainContext(
                spec=_spec(base.fingerprint, f"tenant{number}/bot", "data"),
                train_examples=random_examples([64] * 64),
                base_folder=base.folder,
                checkpoints=Path(scratch, str(number)),
            )
            begun = time.thread_time()
            run: TrainingRun = stack.enter_context(open_run(model, context))
            driver.start(str(number), str(number), run.advance())
            times.append(time.thread_time() - begun)
            driver.run_pass(0.0)
        driver.close()
    return statistics.median(times[1:])


def _start_session(settings: Settings, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __name__, settings.model_dump_json(), name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def _submit(registry: Registry, count: int) -> list[JobRecord]:
    """Submits jobs of examples of about 64 tokens, one per step."""
    draw = random.Random(0)
    words = "time year people way day man thing woman life child world school state family student group".split()
    lines = [
        json.dumps({"prompt": " ".join(draw.choices(words, k=40)), "completion": " ".join(draw.choices(words, k=20))})
        for _ in range(64)
    ]
    raw = "\n".join(lines).encode()
    artifact = registry.artifacts.put({"data.jsonl": raw})
    base = find_base(NAME, Settings.load().cache).fingerprint
    with registry.writing() as session:
        data = {}
        for tenant in (f"tenant{number}" for number in range(_TENANTS)):
            tenants.create(session, tenant)
            data[tenant] = datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), len(lines)).id
        owners = itertools.islice(itertools.cycle(data), count)
        return [
            jobs.submit(session, _spec(base, f"{tenant}/bot{number}", data[tenant]), {}, cost=64.0 * _STEPS)
            for number, tenant in enumerate(owners)
        ]


def _spec(base: str, adapter: str, train: str) -> JobSpec:
    return JobSpec(
        base=base,
        adapter=adapter,
        train=train,
        rank=8,
        steps=_STEPS,
        batch_size=1,
        checkpoint_every=_STEPS,
        keep="last",
    )


def _run_session(settings: Settings, name: str) -> None:
    torch.set_num_threads(1)
    base = find_base(settings.base, settings.cache)
    registry = Registry.open(settings.database, settings.artifacts)
    worker = replace(bench_worker(base, registry, settings), name=worker_name(name, os.getpid()), executor="session")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()

    def is_turn() -> bool:
        with registry.reading() as session:
            return may_take_another(session, name, time.time())

    run_jobs(worker, should_stop=lambda idle: idle > _IDLE_SECONDS, may_take_another=is_turn)


if __name__ == "__main__":
    _run_session(Settings.model_validate_json(sys.argv[1]), sys.argv[2])
