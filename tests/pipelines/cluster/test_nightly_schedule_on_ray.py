"""The schedule of nightly runs as a detached actor of a real Ray; the runs are real processes, without a gateway."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import ray

from loramill.names import AdapterName
from loramill.pipelines.cluster import nightly_schedule as schedule_actor
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.schedule.scheduler import expression_of, start_scheduler
from loramill.registry import Registry, datasets, nightly, nightly_schedule, tenants
from loramill.settings import Settings
from loramill.types import NightlyRun

from ...databases import create_sqlite_database
from ...ray_cluster import ray_cluster
from ...waiting import eventually

DAY, WAIT = 86_400, 300


def actor_pids() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::NightlyScheduleActor"):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def missed_time(registry: Registry) -> None:
    """A schedule of two days ago, so that a run is due at once, and data, so that the run has work."""
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(30)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    artifact = registry.artifacts.put({"data.jsonl": raw})
    with registry.writing() as session:
        tenants.create(session, "acme")
        file = datasets.create(session, "acme", "rows.jsonl", artifact, len(raw), len(rows))
        nightly.add_data(session, AdapterName("acme", "a"), file.id, None)
        expression = expression_of(NightlyDefinition().schedule)
        nightly_schedule.begin_schedule(session, expression, time.time() - 2 * DAY)


def test_the_actor_continues_a_run_after_kills_and_a_restart_of_the_head(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path, url="http://127.0.0.1:9")
    create_sqlite_database(settings.database)
    settings.nightly_file.write_text("")
    registry = Registry.open(settings.database, settings.artifacts)
    missed_time(registry)

    def stopped() -> NightlyRun | None:
        """The run, once its process found no gateway and has ended."""
        with registry.reading() as session:
            (run,) = nightly.list_runs(session) or [None]
            steps = nightly.list_steps(session, run.id) if run else []
        interrupted = any("error" in step.result for step in steps)
        return run if run and interrupted and run.lease_until is None else None

    def resumed_after(holder: str | None) -> Callable[[], bool]:
        return lambda: (run := stopped()) is not None and run.holder != holder

    with ray_cluster(num_cpus=2):
        thread, stop = start_scheduler(settings)  # of a second machine, or of `loramill up`
        schedule_actor.deploy(settings)
        eventually(resumed_after(None), WAIT)
        stop.set()
        thread.join()
        with registry.reading() as session:
            (run,) = nightly.list_runs(session)
            (claimed,) = nightly_schedule.list_times(session, run.id)
        assert claimed.missed == 1

        schedule_actor.deploy(settings)  # a new actor, as after an upgrade, knows the run from the registry
        eventually(resumed_after(run.holder), WAIT)
        before = stopped()
        (pid,) = actor_pids()
        os.kill(pid, signal.SIGKILL)
        eventually(resumed_after(before and before.holder), WAIT)
        assert actor_pids() not in ([], [pid])
        before = stopped()

    with ray_cluster(num_cpus=2):
        schedule_actor.deploy(settings)
        eventually(resumed_after(before and before.holder), WAIT)
        ray.kill(ray.get_actor(schedule_actor.ACTOR_NAME, namespace=schedule_actor.NAMESPACE))
    with registry.reading() as session:
        (last,) = nightly.list_runs(session)
    assert last.id == run.id and last.finished_at is None
    registry.close()
