"""The supervisor on Ray: a detached actor around the reconciler, restarted by Ray when it dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

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
#: Seconds between two removals of dead trainers' placement groups, and between two clean-ups of the stores.
ORPHAN_CHECK_SECONDS, CLEANUP_SECONDS = 5.0, 3600.0
log = logging.getLogger(__name__)


class Supervisor:
    """Runs the reconciler; each session and trainer has a thread in this process, which waits for its `fit()`."""

    def __init__(self, settings: Settings, base: str) -> None:
        logs.configure()
        registry = Registry.open(settings.database, settings.artifacts)
        self._reconciler = Reconciler(
            registry,
            settings.jobs,
            base=base,
            run_session=lambda slot, holder: run_session(settings, slot, holder),
            run_trainer=lambda job, gpus: run_dedicated(settings, job, gpus),
        )
        _start_thread("reconcile", lambda: self._reconciler.run(threading.Event()))
        _start_thread("orphans", _remove_orphans_periodically)
        _start_thread(
            "clean-up",
            lambda: clean_up_periodically(
                registry,
                settings.checkpoints,
                settings.retention,
                interval_seconds=CLEANUP_SECONDS,
                completion_days=settings.completion_days,
            ),
        )

    def ping(self) -> list[str]:
        """Returns the names of the worker slots in which something runs."""
        return self._reconciler.active_slots


def _start_thread(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()


def _remove_orphans_periodically() -> None:
    while True:
        try:
            remove_orphans()
        except Exception:  # Ray's head may be away
            log.exception("placement groups of dead trainers could not be removed; retrying")
        time.sleep(ORPHAN_CHECK_SECONDS)


def deploy(settings: Settings) -> ray.actor.ActorHandle:
    """Starts the supervisor on this process's Ray cluster in place of one that runs there; returns without waiting."""
    base = find_base(settings.base, settings.cache, settings.quantization).fingerprint
    try:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE))
    except ValueError:
        log.info("no supervisor was running")
    options = {"name": ACTOR_NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    environment = {"env_vars": ONLY_ASSIGNED_GPUS}
    return ray.remote(Supervisor).options(**options, runtime_env=environment).remote(settings, base)


def wait_ready(supervisor: ray.actor.ActorHandle) -> None:
    """Waits until the supervisor runs."""
    ray.get(supervisor.ping.remote())
