"""The cold start of a dedicated trainer, in contrast to a warm session. The only training benchmark that needs Ray."""

from __future__ import annotations

import os
import time

import ray

from loramill.jobs.ray.launch import run_dedicated
from loramill.registry import Registry, jobs
from loramill.settings import Settings


def seconds_to_first_step(settings: Settings, registry: Registry, job_id: str) -> float:
    """Wall-clock seconds from the start of a trainer for this queued job until its first step is recorded.

    The Ray cluster on this machine starts before the measurement.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        began = time.time()
        run_dedicated(settings, job_id, gpus=1)
    finally:
        ray.shutdown()
    with registry.reading() as session:
        return next(event.created_at for event in jobs.list_events(session, job_id) if event.kind == "metrics") - began
