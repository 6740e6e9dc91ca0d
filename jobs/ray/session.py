"""A session: one long-lived worker of Ray Train that keeps the base resident and leases job after job."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from ray.train.torch import get_device

from loramill.data.tokenizer import ChatTokenizer
from loramill.jobs.scheduling.reconciler import worker_name
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup
from loramill.jobs.worker.worker import Worker, run_jobs
from loramill.models.catalog import find_base, load_for_training
from loramill.registry import Registry
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings, Settings
from loramill.types import Executor

log = logging.getLogger(__name__)

#: Of training where it shares a machine with the endpoints, whose answers somebody waits for.
NICENESS = 15


def lease_and_train(config: dict[str, Any]) -> None:
    """The train function: ends when it has been idle for long, or the place isn't its holder's any more."""
    settings = Settings.model_validate(config["settings"])
    worker = build_worker(settings, config["place"], "session")
    worker.model()  # before the first job is leased

    def over(idle: float) -> bool:
        if idle > settings.jobs.idle_seconds:
            return True
        with worker.registry.reading() as session:
            return not worker_slots.is_open(session, config["place"], config["holder"])

    run_jobs(worker, should_stop=over)


def build_worker(
    settings: Settings, worker_slot: str, executor: Executor, process_group: ProcessGroup = SINGLE_PROCESS
) -> Worker:
    """A worker in this process."""
    os.nice(NICENESS)
    device = select_device(settings.jobs)
    base = find_base(settings.base, settings.cache, settings.quantization)
    return Worker(
        name=worker_name(worker_slot, os.getpid()),
        registry=Registry.open(settings.database, settings.artifacts),
        base=base,
        model=cache(lambda: load_for_training(base, torch.bfloat16, packed=device.type == "cuda").to(device)),
        device=device,
        tokenizer=ChatTokenizer.load(base.folder),
        checkpoints=settings.checkpoints,
        logs=settings.home / "tensorboard",
        settings=settings.jobs,
        executor=executor,
        process_group=process_group,
    )


def select_device(settings: JobSettings) -> torch.device:
    """The device to train on: this process's share of the GPU that Ray assigned to it, or the CPU.

    A GPU that torch sees is only used if the settings say so. Ray's GPUs may not exist, as in tests.
    """
    torch.set_num_threads(settings.threads)
    if not settings.use_gpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device: torch.device = get_device()
    # Ray counts fractions of a GPU and keeps nobody from taking all of its memory.
    torch.cuda.set_per_process_memory_fraction(1 / settings.per_gpu, device)
    return device
