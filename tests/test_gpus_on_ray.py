"""A process sees only the GPUs that Ray assigned to it. Ray is started with one GPU here; no driver is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from loramill.gpus import ONLY_ASSIGNED_GPUS


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class Process:
    def sees(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def child_sees(self, gpus: float) -> str | None:
        return ray.get(ray.remote(Process).options(num_cpus=0, num_gpus=gpus).remote().sees.remote())


def process(gpus: float) -> ray.actor.ActorHandle:
    environment = {"env_vars": ONLY_ASSIGNED_GPUS}
    return ray.remote(Process).options(num_cpus=0, num_gpus=gpus, runtime_env=environment).remote()


@pytest.mark.usefixtures("cluster")
def test_a_process_sees_only_the_gpu_that_it_requested():
    supervisor, session = process(0), process(0.5)
    assert ray.get([supervisor.sees.remote(), session.sees.remote()]) == ["", "0"]
    # What the supervisor starts inherits its environment.
    assert ray.get([supervisor.child_sees.remote(0), supervisor.child_sees.remote(0.5)]) == ["", "0"]
