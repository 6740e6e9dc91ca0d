"""200 jobs of 20 tenants in four sessions of up to three, which are killed all the time, as are the supervisors."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

from loramill.jobs.scheduling.reconciler import Reconciler
from loramill.registry import adapters, jobs, tenants
from loramill.types import JobRecord, JobStatus

from ..environment import JobEnvironment

TENANTS, EACH = 20, 10
#: Jobs that end between two kills.
PACE = 10
#: The weight of every second tenant; the others have 1.
WEIGHT = 2.0


class Pool:
    """Worker processes, forked on demand; they die with the supervisor that started them, as with Ray."""

    def __init__(self, environment: JobEnvironment) -> None:
        command = [sys.executable, "-m", "tests.jobs.environment", environment.settings.model_dump_json()]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
        )
        self._lock = threading.Lock()
        self.alive: dict[str, tuple[str, int]] = {}
        assert self._server.stdout is not None and self._server.stdout.readline() == "ready\n"

    def run_session(self, slot: str, holder: str) -> None:
        with self._lock:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.write(f"{slot} {holder}\n")
            self._server.stdin.flush()
            pid = int(self._server.stdout.readline())
            self.alive[f"{slot} {holder}"] = holder, pid
        while is_alive(pid):
            time.sleep(0.1)
        self.alive.pop(f"{slot} {holder}")

    def kill(self, chance: random.Random, holder: str | None = None) -> int:
        """Kills a worker, or all of a holder; returns the number of those that were still running."""
        victims = [pid for of, pid in list(self.alive.values()) if holder in (None, of)]
        victims = victims if holder else chance.sample(victims, min(1, len(victims)))
        return sum(was_killed(pid) for pid in victims)

    def end(self) -> None:
        self._server.communicate(timeout=20)


def was_killed(pid: int) -> bool:
    """False for one that has just ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def start(environment: JobEnvironment, pool: Pool) -> tuple[Reconciler, threading.Event]:
    reconciler = Reconciler(
        environment.registry, environment.settings.jobs, run_session=pool.run_session, run_trainer=None
    )  # type: ignore[arg-type]
    ended = threading.Event()
    threading.Thread(target=reconciler.run, args=(ended,), daemon=True).start()
    return reconciler, ended


def submitted(environment: JobEnvironment) -> list[JobRecord]:
    """All tenants' jobs, on the same data, so that the same weights must come of them."""
    data = {f"tenant{n}": environment.data(f"tenant{n}") for n in range(TENANTS)}
    with environment.registry.writing() as session:
        for n in range(TENANTS):
            tenants.set_fair_share(session, f"tenant{n}", weight=WEIGHT if n % 2 else 1.0)
        return [
            jobs.submit(session, environment.spec(f"{tenant}/bot", train, checkpoint_every=1), {}, cost=100.0)
            for _ in range(EACH)
            for tenant, train in data.items()
        ]


def test_each_job_ends_once_while_processes_are_killed(tmp_path: Path, tiny_chat_base: Path) -> None:
    environment = JobEnvironment.at(
        tmp_path, tiny_chat_base, lease_seconds=2, idle_seconds=600, max_attempts=99, per_session=3
    )
    pool, chance, killed = Pool(environment), random.Random(0), Counter[str]()
    queued = submitted(environment)
    reconcilers = [start(environment, pool), start(environment, pool)]
    deadline = time.monotonic() + 600
    for goal in range(len(queued) - PACE, -1, -PACE):
        while left(environment) > goal:
            assert time.monotonic() < deadline, f"{left(environment)} jobs are left, after kills of {killed}"
            time.sleep(0.2)
        time.sleep(chance.random() * 0.3)
        if goal % (6 * PACE) < PACE:
            reconciler, ended = reconcilers.pop(0)
            ended.set()
            pool.kill(chance, reconciler.holder)
            killed["supervisor"] += 1
            reconcilers.append(start(environment, pool))
        else:
            killed["worker"] += pool.kill(chance)
    while left(environment):
        assert time.monotonic() < deadline, f"{left(environment)} jobs are left at the end"
        time.sleep(0.2)
    for reconciler, ended in reconcilers:
        ended.set()
        pool.kill(chance, reconciler.holder)
    pool.end()
    assert killed["worker"] >= 12 and killed["supervisor"] >= 3
    check(environment, queued)


def left(environment: JobEnvironment) -> int:
    with environment.registry.reading() as session:
        return jobs.count_open(session)


def check(environment: JobEnvironment, queued: list[JobRecord]) -> None:
    """Each job has ended once, with a complete version, and every tenant has had its share."""
    published: dict[str, list[str]] = defaultdict(list)
    contents = set()
    with environment.registry.reading() as session:
        done = [jobs.get(session, job.id) for job in queued]
        for tenant in {job.tenant for job in queued}:
            for version in adapters.list_versions(session, f"{tenant}/bot"):
                published[version.job or ""].append(version.id)
        for job in done:
            events = [event for event in jobs.list_events(session, job.id) if event.message.startswith("Published")]
            assert (job.status, len(events)) == (JobStatus.SUCCEEDED, 1), job
    # Each once, complete, and to the same bits as if nothing had been killed.
    assert {job.id: [job.version] for job in done} == published
    for job in done:
        environment.registry.artifacts.fetch(job.version or "")
        contents.add(environment.weights(job.version))
    assert len(contents) == 1
    # Fair as long as every tenant has jobs waiting.
    first = Counter(job.tenant for job in sorted(done, key=lambda job: job.finished_at or 0)[:120])
    heavy = sum(count for tenant, count in first.items() if int(tenant.removeprefix("tenant")) % 2)
    # Two of three; without weights it would be one of two, 60.
    assert abs(heavy - 80) <= 8, first
    for tenant, count in first.items():
        assert abs(count - (8 if int(tenant.removeprefix("tenant")) % 2 else 4)) <= 2, first
