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
from loramill.jobs.ray.session import prepare, resident
from loramill.jobs.train.distributed import ONE, Processes
from loramill.jobs.worker.worker import Worker, carry_out, steps, take
from loramill.settings import Settings
from loramill.types import JobRecord

log = logging.getLogger(__name__)


def lease_and_train(config: dict[str, Any]) -> None:
    """The train function of each process."""
    settings = Settings.model_validate(config["settings"])
    device = prepare(settings.jobs)
    worker = resident(settings, config["place"], "dedicated", processes_of(device))
    job = same_for_all(take(worker, config["place"]) if worker.processes.rank == 0 else None)
    if job is None:
        return  # it was cancelled meanwhile, or another supervisor's trainer has it
    if worker.processes.rank == 0:
        carry_out(worker, job)
    else:
        follow(worker, job)


def processes_of(device: torch.device) -> Processes:
    """The processes of this trainer, which sum tensors over Gloo or, on GPUs, over NCCL."""
    if device.type == "cuda":
        _regroup("cpu:gloo,cuda:nccl")
    size = dist.get_world_size()
    return Processes(dist.get_rank(), size, dist.all_reduce) if size > 1 else ONE


def _regroup(backend: str) -> None:
    """Connects the same processes by another backend.

    Ray would have to be told of it where the supervisor runs, and that machine may have no GPU.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d.PrefixStore(backend, dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def same_for_all(job: JobRecord | None) -> JobRecord | None:
    """The first process's job, in every process."""
    found = [None if job is None else job.model_dump_json()]
    dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else JobRecord.model_validate_json(found[0])


def follow(worker: Worker, job: JobRecord) -> None:
    """Takes this process's part of each step; ends when the first process does."""
    try:
        for _ in steps(worker, job, check=lambda: None):
            pass
    except JobError as error:
        log.info("job %s: this process ends with the first: %s", job.id, error)
