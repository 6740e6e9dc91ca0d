"""The rival of a warm session: a trainer that is started for one job. It is the only one here that needs Ray."""

from __future__ import annotations

import os
import time

import ray

from loramill.jobs.ray.launch import run_dedicated
from loramill.registry import Registry, jobs
from loramill.settings import Settings


def seconds_to_first_step(settings: Settings, registry: Registry, job_id: str) -> float:
    """Seconds, by the clock, from the start of a trainer for this waiting job to the record of its first step.

    The cluster, of this machine's own, is there before.
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
