"""Trainers of Ray Train, started and awaited: here is who gets what of the cluster, and no word of training.

What trains is imported by the processes that do. Those that start trainers and watch over them would else all load
torch, transformers, PEFT and bitsandbytes, which takes 7 s and 400 MB, and need none of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loramill import logs
from loramill.gpus import ONLY_ASSIGNED_GPUS
from loramill.settings import Settings
from loramill.storage.object_store import open_filesystem

if TYPE_CHECKING:
    from ray.train.backend import BackendConfig


def run_session(settings: Settings, worker_slot: str, holder: str) -> None:
    """Runs one session at a place until it has been idle for `idle_seconds`, or the place isn't the holder's any more.

    A killed worker is restarted by Ray Train.
    """
    jobs = settings.jobs
    resources = {"GPU": 1 / jobs.per_gpu} if jobs.use_gpu else {"CPU": jobs.cpus}
    _fit(
        _session,
        {"settings": settings.model_dump(mode="json"), "place": worker_slot, "holder": holder},
        settings,
        resources,
        max_failures=-1,
    )


def run_dedicated(settings: Settings, job_id: str, gpus: int) -> None:
    """Runs one attempt of a job in `gpus` processes, each with a GPU, or without any where the pool has none."""
    from ray.train.torch import TorchConfig

    jobs = settings.jobs
    resources = {"GPU": 1.0} if jobs.use_gpu else {"CPU": jobs.cpus}
    # The whole GPU is this job's, whatever fraction a session takes.
    alone = settings.model_copy(update={"jobs": jobs.model_copy(update={"per_gpu": 1})})
    _fit(
        _dedicated,
        {"settings": alone.model_dump(mode="json"), "place": job_id},
        settings,
        resources,
        workers=gpus,
        # On a GPU, too: what has to cross GPUs takes a group of its own.
        backend=TorchConfig(backend="gloo"),
        max_failures=0,
    )


def _fit(
    train: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    settings: Settings,
    resources: dict[str, float],
    *,
    workers: int = 1,
    backend: BackendConfig | None = None,
    max_failures: int,
) -> None:
    """Runs a train function on Ray Train's workers, each with `resources`, and removes Ray's notes on it.

    `backend` connects the workers; one alone needs none.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from loramill.jobs.ray.lean_trainer import LeanTrainer

    # The name is never used again.
    name = f"{config['place']}-{uuid.uuid4().hex[:12]}"
    run = RunConfig(
        name=name,
        storage_path=settings.sessions,
        failure_config=FailureConfig(max_failures=max_failures),
        worker_runtime_env={"env_vars": ONLY_ASSIGNED_GPUS},
    )
    trainer = LeanTrainer(
        train,
        train_loop_config=config,
        backend_config=backend,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=run,
    )
    try:
        trainer.fit()
    finally:
        # Everything that matters is in the record.
        files, root = open_filesystem(settings.sessions)
        if files.exists(f"{root}/{name}"):
            files.rm(f"{root}/{name}", recursive=True)


def _session(config: dict[str, Any]) -> None:
    logs.configure()  # before imports that log
    from loramill.jobs.ray.session import lease_and_train

    lease_and_train(config)


def _dedicated(config: dict[str, Any]) -> None:
    logs.configure()  # before imports that log
    from loramill.jobs.ray.dedicated import lease_and_train

    lease_and_train(config)
