"""The schedule of nightly runs, and decisions about rollouts, on a Ray cluster: a detached actor on the head.

Ray restarts it when it dies.
"""

from __future__ import annotations

import logging
import threading

import ray

from loramill import logs
from loramill.pipelines.nightly.rollouts.advance import start_deciding
from loramill.pipelines.nightly.schedule.scheduler import start_scheduler
from loramill.settings import Settings

ACTOR_NAME = "loramill-nightly-schedule"
NAMESPACE = "loramill"
#: A resource of Ray that only the head has: nightly.yaml and the admin key are files of that machine.
ON_HEAD = {"node:__internal_head__": 0.001}
log = logging.getLogger(__name__)


class NightlyScheduleActor:
    """Runs the scheduler, and decides about rollouts. Their state is in the registry and outlives a restart."""

    def __init__(self, settings: Settings) -> None:
        logs.configure()
        start_scheduler(settings)
        start_deciding(settings, threading.Event())

    def ping(self) -> None:
        """Returns when it runs."""


def deploy(settings: Settings) -> None:
    """Starts the schedule on this process's Ray cluster, in place of one that runs there."""
    try:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE))
    except ValueError:
        log.info("no schedule of nightly runs was running")
    options = {"name": ACTOR_NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    actor = ray.remote(NightlyScheduleActor).options(**options, resources=ON_HEAD).remote(settings)
    ray.get(actor.ping.remote())
