"""Starts sessions and trainers on Ray Train, and waits until they end. Nothing here trains.

The processes that train import what they need. Without that, each process that starts and watches trainers would load
torch, transformers, PEFT and bitsandbytes, which takes 7 s and 400 MB.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loramill import logs
from loramill.gpus import GPU_ALLOCATOR, ONLY_ASSIGNED_GPUS
from loramill.settings import Settings
from loramill.storage.object_store import open_filesystem

if TYPE_CHECKING:
    from ray.train.backend import BackendConfig


def run_session(settings: Settings, worker_slot: str, holder: str) -> None:
    """Runs one session until it has been idle for `idle_seconds`, or its worker slot is ending or another holder's.

    Ray Train restarts a worker that was killed.
    """
    _fit(_run_session, settings, {"worker_slot": worker_slot, "holder": holder}, max_failures=-1)


def run_dedicated(settings: Settings, job_id: str, gpus: int) -> None:
    """Runs one attempt of a job in `gpus` processes, each with a GPU, or without GPUs where the pool has none."""
    from ray.train.torch import TorchConfig

    # The GPUs are this job's alone, whatever share a session takes, except for the share of an engine. Several
    # processes need whole GPUs: Ray could place two of them on one GPU, which NCCL refuses.
    alone = {"per_gpu": 1} if gpus == 1 else {"per_gpu": 1, "gpu_fraction": 1.0}
    whole_gpus = settings.model_copy(update={"jobs": settings.jobs.model_copy(update=alone)})
    # Gloo on GPUs, too: the processes connect again by NCCL for tensors that cross GPUs.
    backend = TorchConfig(backend="gloo")
    _fit(_run_dedicated, whole_gpus, {"worker_slot": job_id}, workers=gpus, backend=backend, max_failures=0)


def _fit(
    train: Callable[[dict[str, Any]], None],
    settings: Settings,
    config: dict[str, str],
    *,
    workers: int = 1,
    backend: BackendConfig | None = None,
    max_failures: int,
) -> None:
    """Runs a train function on Ray Train's workers, and removes the files that Ray Train writes about it.

    Args:
        backend: connects the workers; a single one needs none.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from loramill.jobs.ray.lean_trainer import LeanTrainer

    jobs = settings.jobs
    resources, variables = {"CPU": jobs.cpus}, ONLY_ASSIGNED_GPUS
    if jobs.on_gpu:
        resources, variables = {"GPU": jobs.gpu_share}, ONLY_ASSIGNED_GPUS | GPU_ALLOCATOR
    name = f"{config['worker_slot']}-{uuid.uuid4().hex[:12]}"  # never used again
    trainer = LeanTrainer(
        train,
        train_loop_config={"settings": settings.model_dump(mode="json"), **config},
        backend_config=backend,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=jobs.on_gpu,
            resources_per_worker=resources,
            accelerator_type=jobs.accelerator_type if jobs.on_gpu else None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=settings.sessions,
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": variables},
        ),
    )
    try:
        trainer.fit()
    finally:
        # Everything that matters is in the registry.
        files, root = open_filesystem(settings.sessions)
        if files.exists(f"{root}/{name}"):
            files.rm(f"{root}/{name}", recursive=True)


def _run_session(config: dict[str, Any]) -> None:
    logs.configure()  # before imports that log
    from loramill.jobs.ray.train_worker import run_session

    run_session(config)


def _run_dedicated(config: dict[str, Any]) -> None:
    logs.configure()  # before imports that log
    from loramill.jobs.ray.train_worker import run_dedicated

    run_dedicated(config)
