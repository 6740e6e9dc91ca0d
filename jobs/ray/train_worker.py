"""A worker process of Ray Train: leases jobs and trains them.

A session keeps the base resident and runs job after job, or several at once. A dedicated trainer runs one job, long or
on several GPUs: its first process leases the job, reports and publishes, and the others take their part of each step.
Ray Train retries no job: attempts are the queue's.
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from ray.train.torch import get_device

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import JobError
from loramill.gpus.process import open_gpu
from loramill.jobs.scheduling.reconciler import may_take_another, worker_name
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup, connect_processes
from loramill.jobs.worker.admission import SessionMemory
from loramill.jobs.worker.session import max_pass_tokens, run_jobs
from loramill.jobs.worker.worker import Worker, lease_next_job, run_attempt, training_steps
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.registry import Registry, pool_gpus
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings, Settings
from loramill.sizing import anatomy, find_config
from loramill.types import Executor, GpuInfo, JobRecord

log = logging.getLogger(__name__)

#: Niceness of training where it shares a machine with serving, which has to answer soon.
NICENESS = 15


def run_session(config: dict[str, Any]) -> None:
    """Runs jobs until the session has been idle for long or its worker slot is ending or no longer its holder's."""
    settings, slot, holder = Settings.model_validate(config["settings"]), config["worker_slot"], config["holder"]
    device, gpu = select_device(settings.jobs)
    worker = build_worker(settings, slot, "session", device)
    report_gpu(worker.registry, gpu)
    memory = session_memory(settings, worker.base, device, gpu)
    worker.model()  # load the base before the first job is leased

    def should_stop(idle_seconds: float) -> bool:
        if idle_seconds > settings.jobs.idle_seconds:
            return True
        with worker.registry.reading() as session:
            return not worker_slots.is_open(session, slot, holder)

    def is_turn() -> bool:
        with worker.registry.reading() as session:
            return may_take_another(session, slot, time.time())

    run_jobs(worker, should_stop=should_stop, may_take_another=is_turn, memory=memory)


def run_dedicated(config: dict[str, Any]) -> None:
    """Runs one attempt of the job whose id is the worker slot's name, together with the trainer's other processes."""
    settings, job_id = Settings.model_validate(config["settings"]), config["worker_slot"]
    device, gpu = select_device(settings.jobs)
    worker = build_worker(settings, job_id, "dedicated", device, connect_processes(device))
    report_gpu(worker.registry, gpu)
    job = broadcast_job(lease_next_job(worker, job_id) if worker.process_group.rank == 0 else None)
    if job is None:
        return  # it was cancelled meanwhile, or another supervisor's trainer leased it
    if worker.process_group.rank == 0:
        run_attempt(worker, job)
    else:
        follow_first_process(worker, job)


def build_worker(
    settings: Settings,
    worker_slot: str,
    executor: Executor,
    device: torch.device,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Worker:
    """Builds the worker of this process."""
    os.nice(NICENESS)
    base = find_base(settings.base, settings.cache, settings.quantization)
    return Worker(
        name=worker_name(worker_slot, os.getpid()),
        registry=Registry.open(settings.database, settings.artifacts),
        base=base,
        model=cache(lambda: load_for_training(base, torch.bfloat16, device=device, cache=settings.cache)),
        device=device,
        tokenizer=ChatTokenizer.load(base.folder),
        checkpoints=settings.checkpoints,
        logs=settings.home / "tensorboard",
        settings=settings.jobs,
        executor=executor,
        process_group=process_group,
    )


def select_device(settings: JobSettings) -> tuple[torch.device, GpuInfo | None]:
    """Returns the device to train on: the CPU, or the GPU that Ray assigned to this process, and the GPU's description.

    A GPU that torch sees is only used if the settings enable it. Ray's GPUs may not exist, as in tests.

    Raises:
        SetupError: the GPU is too old.
    """
    torch.set_num_threads(settings.threads)
    if not settings.on_gpu or not torch.cuda.is_available():
        return torch.device("cpu"), None
    device: torch.device = get_device()
    return device, open_gpu(settings.gpu_share, device)


def session_memory(settings: Settings, base: Base, device: torch.device, gpu: GpuInfo | None) -> SessionMemory | None:
    """Returns the memory of a session; None on a CPU, unless the settings have it."""
    size = settings.jobs.device_bytes if gpu is None else int(gpu.bytes * settings.jobs.gpu_share)
    if size is None:
        return None
    config = anatomy(find_config(settings.base, settings.cache))
    return SessionMemory(
        config,
        base.quantization,
        "cpu" if gpu is None else "cuda",
        size,
        pass_tokens=max_pass_tokens(settings.jobs, device),
    )


def report_gpu(registry: Registry, gpu: GpuInfo | None) -> None:
    """Reports this process's GPU to the registry, so that jobs are sized for the smallest GPU of the pool."""
    if gpu is not None:
        with registry.writing() as session:
            pool_gpus.report(session, gpu, now=time.time())


def broadcast_job(job: JobRecord | None) -> JobRecord | None:
    """Returns the first process's job in every process."""
    message = [None if job is None else job.model_dump_json()]
    dist.broadcast_object_list(message, src=0)
    return None if message[0] is None else JobRecord.model_validate_json(message[0])


def follow_first_process(worker: Worker, job: JobRecord) -> None:
    """Takes this process's part of each step; ends when the first process ends."""
    try:
        for _ in training_steps(worker, job, raise_if_stopped=lambda: None):
            pass
    except JobError as error:
        log.info("job %s: this process ends with the first: %s", job.id, error)
