"""Processes are killed on a real Ray with fake GPUs; takes minutes, so only if SLOW is set."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loramill.jobs.ray.supervisor import deploy
from loramill.types import JobStatus

from ...ray_cluster import ray_cluster
from ..environment import JobEnvironment
from ..worker.test_killed_workers import PACE, check, left, submitted

pytestmark = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes; set SLOW=1")

#: The beginning of the title of each kind of process that is killed.
VICTIMS = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController", "supervisor": "ray::Supervisor"}


@pytest.fixture
def environment(tmp_path: Path, tiny_chat_base: Path) -> Iterator[JobEnvironment]:
    fields = {"use_gpu": True, "lease_seconds": 5, "idle_seconds": 600, "max_attempts": 99}
    with ray_cluster(num_cpus=8, num_gpus=4):
        yield JobEnvironment.at(tmp_path, tiny_chat_base, **fields)


def kill(chance: random.Random, kind: str) -> int:
    """Kills one of our processes of this kind, if there is one; returns the number killed."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith(VICTIMS[kind]):
            alive.append(process.pid)
    for pid in chance.sample(alive, min(1, len(alive))):
        os.kill(pid, signal.SIGKILL)
    return min(1, len(alive))


def test_each_job_ends_once_while_processes_are_killed(environment: JobEnvironment) -> None:
    queued, chance, killed = submitted(environment), random.Random(0), Counter[str]()
    deploy(environment.settings)
    deadline = time.monotonic() + 1200
    for goal in range(len(queued) - 2 * PACE, -1, -4 * PACE):
        while left(environment) > goal:
            assert time.monotonic() < deadline, f"{left(environment)} jobs are left, after kills of {killed}"
            time.sleep(0.3)
        kind = ("worker", "controller", "worker", "supervisor")[sum(killed.values()) % 4]
        killed[kind] += kill(chance, kind)
    while left(environment):
        assert time.monotonic() < deadline, f"{left(environment)} jobs are left at the end"
        time.sleep(0.3)
    assert set(killed) == set(VICTIMS)
    check(environment, queued)


def test_a_trainer_that_loses_one_of_two_processes_is_retried(environment: JobEnvironment) -> None:
    spec = {"steps": 60, "batch_size": 6, "checkpoint_every": 5, "micro_tokens": 16, "dropout": 0.0}
    job = environment.submit("acme/two", executor="dedicated", gpus=2, **spec)
    deploy(environment.settings)

    def until(status: JobStatus, step: int) -> None:
        deadline = time.monotonic() + 300
        while (now := environment.now(job)).status is not status or now.step < step:
            assert time.monotonic() < deadline, now
            time.sleep(0.1)

    until(JobStatus.RUNNING, 6)
    assert kill(random.Random(1), "worker")
    until(JobStatus.SUCCEEDED, 60)
    assert environment.now(job).attempt == 2
