"""The supervisor on Ray: a detached actor around the plain one in pool.py, restarted by Ray when it dies."""

from __future__ import annotations

import logging
import threading
import time

import ray

from loramill import logs
from loramill.gpus import ONLY_ASSIGNED_GPUS
from loramill.jobs.ray.launch import run_dedicated, run_session
from loramill.jobs.ray.orphans import remove_orphans
from loramill.jobs.scheduling.cleanup import clean_up_periodically
from loramill.jobs.scheduling.reconciler import Reconciler
from loramill.models.catalog import find_base
from loramill.registry import Registry
from loramill.settings import Settings

ACTOR_NAME = "loramill-supervisor"
NAMESPACE = "loramill"
#: Seconds between looks for what dead trainers left, and for what the store need not keep.
ORPHAN_CHECK_SECONDS, CLEANUP_SECONDS = 5.0, 3600.0
log = logging.getLogger(__name__)


class Supervisor:
    """Watches the queue; each session and trainer runs in a thread here, which waits for its `fit()`."""

    def __init__(self, settings: Settings, base: str) -> None:
        logs.configure()
        registry = Registry.open(settings.database, settings.artifacts)
        self._reconciler = Reconciler(
            registry,
            settings.jobs,
            base=base,
            run_session=lambda place, holder: run_session(settings, place, holder),
            run_trainer=lambda job, gpus: run_dedicated(settings, job, gpus),
        )
        threading.Thread(target=self._reconciler.run, args=(threading.Event(),), name="watch", daemon=True).start()
        threading.Thread(target=_remove_orphans_periodically, name="leftovers", daemon=True).start()
        tidying = {"registry": registry, "checkpoints": settings.checkpoints, "every": CLEANUP_SECONDS}
        threading.Thread(target=clean_up_periodically, kwargs=tidying, name="tidy", daemon=True).start()

    def ping(self) -> list[str]:
        """Answers with the names of the places where something runs."""
        return self._reconciler.active_slots


def _remove_orphans_periodically() -> None:
    while True:
        try:
            remove_orphans()
        except Exception:  # Ray's head may be away; it is looked at again
            log.exception("what dead trainers left could not be removed; trying again")
        time.sleep(ORPHAN_CHECK_SECONDS)


def deploy(settings: Settings) -> None:
    """Starts the supervisor on the Ray cluster this process is connected to, in place of one that runs there."""
    base = find_base(settings.base, settings.cache, settings.quantization).fingerprint
    try:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE))
    except ValueError:
        log.info("no supervisor was running")
    options = {"name": ACTOR_NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    environment = {"env_vars": ONLY_ASSIGNED_GPUS}
    supervisor = ray.remote(Supervisor).options(**options, runtime_env=environment).remote(settings, base)
    ray.get(supervisor.ping.remote())
