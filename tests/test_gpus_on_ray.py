"""A process sees only the GPUs that Ray assigned to it. Ray is started with one GPU here; no driver is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from loramill.gpus import ONLY_ASSIGNED_GPUS
from loramill.gpus.machine import Gpu
from loramill.gpus.sharing import decide_devices
from loramill.serve.deployments import engine_options
from loramill.settings import Settings

from .ray_cluster import ray_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=2, num_gpus=1):
        yield


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


@pytest.mark.usefixtures("cluster")
def test_an_engine_and_its_sessions_are_placed_on_one_gpu():
    gpu = Gpu(name="NVIDIA H100", bytes=79 << 30, capability=(9, 0), free_bytes=79 << 30, driver="580.82.07")
    settings = decide_devices(Settings(jobs={"sessions": 16, "per_gpu": 3}), (gpu,), "13.0").settings
    assert settings.jobs.sessions == 3
    engine = process(engine_options(settings)["num_gpus"])
    sessions = [process(settings.jobs.gpu_share) for _ in range(settings.jobs.sessions)]
    assert ray.get([each.sees.remote() for each in (engine, *sessions)], timeout=300) == ["0"] * 4
    assert ray.available_resources().get("GPU", 0) < settings.jobs.gpu_share
