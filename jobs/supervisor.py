"""The supervisor: a detached Ray actor that keeps as many training sessions alive as the queue asks for.

It holds no state that matters: killed, it is restarted by Ray and reads from the record what is to be done.
"""

from __future__ import annotations

import logging
import threading
import time

import ray

from loramill.jobs.session import run_session
from loramill.registry import Registry, jobs
from loramill.settings import Settings

NAME = "loramill-supervisor"
NAMESPACE = "loramill"
log = logging.getLogger(__name__)


def sessions_to_start(open_jobs: int, alive: int, limit: int) -> int:
    """How many sessions are missing: one for each open job (queued or running), within the limit."""
    return max(0, min(open_jobs, limit) - alive)


class Supervisor:
    """Watches the queue and starts sessions; each runs in a thread, which waits for its `fit()`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = Registry.open(settings.database, settings.artifacts)
        self._sessions: set[threading.Thread] = set()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def ping(self) -> int:
        """Answers with the number of sessions that are alive."""
        return sum(thread.is_alive() for thread in self._sessions)

    def _watch(self) -> None:
        while True:
            try:
                self._start_missing()
            except Exception:  # whatever it was (a busy database, say), the next look may succeed
                log.exception("the supervisor could not look at the queue; trying again")
            time.sleep(1.0)

    def _start_missing(self) -> None:
        self._sessions = {thread for thread in self._sessions if thread.is_alive()}
        with self._registry.reading() as session:
            open_jobs = jobs.count_open(session)
        for _ in range(sessions_to_start(open_jobs, len(self._sessions), self._settings.jobs.sessions)):
            thread = threading.Thread(target=self._run_one, name="session", daemon=True)
            thread.start()
            self._sessions.add(thread)

    def _run_one(self) -> None:
        try:
            run_session(self._settings)
        except Exception:  # the jobs are in the record; the next look starts another session
            log.exception("a training session ended with an error")
            time.sleep(5.0)


def deploy(settings: Settings) -> None:
    """Starts the supervisor on the Ray cluster this process is connected to, in place of one that runs there."""
    try:
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
    except ValueError:
        log.info("no supervisor was running")
    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    supervisor = ray.remote(Supervisor).options(**options).remote(settings)
    ray.get(supervisor.ping.remote())
