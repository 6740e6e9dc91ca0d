"""A Ray Train session: one long-lived `TorchTrainer` worker that keeps the base resident and leases job after job."""

from __future__ import annotations

import os
import uuid
from typing import Any

import torch
from fsspec.core import url_to_fs
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from loramill.bases import find_base, load_for_training
from loramill.chat import ChatTokenizer
from loramill.jobs.worker import Worker, work
from loramill.registry import Registry
from loramill.settings import Settings


def run_session(settings: Settings) -> None:
    """Runs one session until it has been idle for `idle_seconds`. A killed worker is restarted by Ray Train."""
    name, jobs = f"session-{uuid.uuid4().hex[:12]}", settings.jobs
    trainer = TorchTrainer(
        lease_and_train,
        train_loop_config={"settings": settings.model_dump(mode="json"), "name": name},
        torch_config=TorchConfig(backend="nccl" if jobs.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=1, use_gpu=jobs.use_gpu, resources_per_worker={"GPU": 1} if jobs.use_gpu else {"CPU": jobs.cpus}
        ),
        run_config=RunConfig(name=name, storage_path=settings.sessions, failure_config=FailureConfig(max_failures=-1)),
    )
    try:
        trainer.fit()
    finally:
        # The name is never used again, and everything that matters is in the record.
        files, root = url_to_fs(settings.sessions)
        files.rm(f"{root}/{name}", recursive=True)


def lease_and_train(config: dict[str, Any]) -> None:
    """The train function of a session."""
    settings = Settings.model_validate(config["settings"])
    torch.set_num_threads(settings.jobs.threads)
    base = find_base(settings.base, settings.cache, settings.quantization)
    worker = Worker(
        owner=f"{config['name']}:{os.getpid()}",
        registry=Registry.open(settings.database, settings.artifacts),
        base=base,
        model=load_for_training(base, torch.bfloat16).to(get_device()),
        tokenizer=ChatTokenizer.load(base.folder),
        checkpoints=settings.home / "checkpoints",
        settings=settings.jobs,
    )
    work(worker, until=lambda idle: idle > settings.jobs.idle_seconds)
