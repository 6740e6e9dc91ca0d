"""A trainer of one job's own, for long jobs and those of several GPUs. No attempt is Ray's: all are the queue's.

The first process leases the job, reports and publishes; the others follow its passes. When it can't go on, for
whatever reason, that is in the record, and the group ends.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from loramill.errors import JobError
from loramill.jobs.ray.session import build_worker, select_device
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup
from loramill.jobs.worker.worker import Worker, lease_next_job, run_attempt, training_steps
from loramill.settings import Settings
from loramill.types import JobRecord

log = logging.getLogger(__name__)


def lease_and_train(config: dict[str, Any]) -> None:
    """The train function of each process."""
    settings = Settings.model_validate(config["settings"])
    device = select_device(settings.jobs)
    worker = build_worker(settings, config["place"], "dedicated", connect_processes(device))
    job = broadcast_job(lease_next_job(worker, config["place"]) if worker.process_group.rank == 0 else None)
    if job is None:
        return  # it was cancelled meanwhile, or another supervisor's trainer has it
    if worker.process_group.rank == 0:
        run_attempt(worker, job)
    else:
        follow_first_process(worker, job)


def connect_processes(device: torch.device) -> ProcessGroup:
    """The processes of this trainer, which sum tensors over Gloo or, on GPUs, over NCCL."""
    if device.type == "cuda":
        _reconnect("cpu:gloo,cuda:nccl")
    size = dist.get_world_size()
    return ProcessGroup(dist.get_rank(), size, dist.all_reduce) if size > 1 else SINGLE_PROCESS


def _reconnect(backend: str) -> None:
    """Connects the same processes by another backend.

    Ray would have to be told of it where the supervisor runs, and that machine may have no GPU.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d.PrefixStore(backend, dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def broadcast_job(job: JobRecord | None) -> JobRecord | None:
    """The first process's job, in every process."""
    found = [None if job is None else job.model_dump_json()]
    dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else JobRecord.model_validate_json(found[0])


def follow_first_process(worker: Worker, job: JobRecord) -> None:
    """Takes this process's part of each step; ends when the first process does."""
    try:
        for _ in training_steps(worker, job, raise_if_stopped=lambda: None):
            pass
    except JobError as error:
        log.info("job %s: this process ends with the first: %s", job.id, error)
