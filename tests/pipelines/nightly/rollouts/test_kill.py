"""The process that decides about rollouts is killed at random moments: nothing is lost, nothing happens twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from loramill.names import AdapterName
from loramill.registry import Registry, adapters, audit, tenants
from loramill.registry.rollouts import moves, records, traffic
from loramill.registry.rollouts.traffic import TrafficKey
from loramill.types import Alias, RolloutKind, RolloutOutcome, TrafficCounts, VersionRecord, WatchPolicy

from ....databases import create_sqlite_database
from ....waiting import eventually

OLD, NEW = "1" * 64, "2" * 64
START, END = 6_000.0, 6_600.0
POLICY = WatchPolicy(window_seconds=END - START)
NAMES = [f"acme/a{number}" for number in range(40)]
#: Not a fork of the tests' process: the other threads are missing there, which may hold a lock forever.
ADVANCE = """
import sys
from loramill.pipelines.nightly.rollouts.advance import advance
from loramill.registry import Registry

registry = Registry.open(sys.argv[1], sys.argv[2])
while True:
    advance(registry, float(sys.argv[3]))
"""


def prepare(registry: Registry) -> None:
    """Canaries that are to be promoted, and watched champions of which each second one answers nothing."""
    with registry.writing() as session:
        tenants.create(session, "acme")
        counts = {}
        for number, name in enumerate(NAMES):
            adapters.get_or_create(session, AdapterName.parse(name))
            for version in (OLD, NEW):
                record = VersionRecord(id=version, adapter=name, job=None, base="b" * 64, bytes=1, created_at=1.0)
                adapters.add_version(session, record)
            if number < 20:
                moves.start_canary(session, name, share=0.5, policy=POLICY, promote_at_end=True, now=START)
            else:
                moves.promote_watched(session, name, NEW, "better", policy=POLICY, now=START)
            bad = 100 * (number % 2) if number >= 20 else 0
            counts[TrafficKey(name, NEW, 6_000)] = TrafficCounts(requests=100, empty=bad)
            counts[TrafficKey(name, OLD, 6_000)] = TrafficCounts(requests=100)
        traffic.write(session, "g1", counts)


def undecided(registry: Registry) -> int:
    with registry.reading() as session:
        return sum(each.started_at == START for each in records.list_open(session))


def test_killed_at_any_moment_it_loses_nothing_and_promotes_nothing_twice(tmp_path: Path) -> None:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    artifacts = (tmp_path / "artifacts").as_uri()
    registry = Registry.open(url, artifacts)
    prepare(registry)
    kills, moments = 0, random.Random(17)
    while left := undecided(registry):
        process = subprocess.Popen([sys.executable, "-c", ADVANCE, url, artifacts, str(END)])
        eventually(lambda left=left: undecided(registry) <= max(0, left - 5))
        time.sleep(moments.random() * 0.05)  # into the next decisions
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 2  # else no kill came in between
    with registry.reading() as session:
        changes = Counter((each.subject, each.action) for each in audit.list_changes(session, "acme", limit=1000))
        for number, name in enumerate(NAMES):
            history = [each.version for each in adapters.alias_history(session, name) if each.alias is Alias.CHAMPION]
            rollouts = [(each.kind, each.outcome) for each in records.list_rollouts(session, name=name)]
            if number < 20:
                assert sorted(history, key=str) == [OLD, NEW]
                assert rollouts == [(RolloutKind.WATCH, None), (RolloutKind.CANARY, RolloutOutcome.PROMOTED)]
                assert changes[name, "adapter.promote"] == 1
            elif number % 2:
                assert sorted(history, key=str) == [OLD, OLD, NEW]
                assert rollouts == [(RolloutKind.WATCH, RolloutOutcome.ROLLED_BACK)]
                assert changes[name, "adapter.rollback"] == 1
            else:
                assert rollouts == [(RolloutKind.WATCH, RolloutOutcome.KEPT)]
                assert changes[name, "adapter.keep"] == 1
    registry.close()
