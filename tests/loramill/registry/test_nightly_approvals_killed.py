"""The process of a person who approves is killed at random moments: nothing is lost, nothing happens twice."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path

from loramill.cli.adapters.nightly_approve import decide
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, audit, nightly_approvals, tenants
from loramill.registry.rollouts import records
from loramill.types import Alias, Approval, VersionRecord

from ...databases import create_sqlite_database
from ...waiting import eventually
from .waiting_challengers import ask

FIRST, SECOND = "1" * 64, "2" * 64
NAMES = [f"acme/a{number}" for number in range(30)]
FORK = multiprocessing.get_context("fork")


def waiting(registry: Registry) -> list[Approval]:
    with registry.reading() as session:
        return nightly_approvals.list_waiting(session)


def approve_all(url: str, artifacts: str) -> None:
    registry = Registry.open(url, artifacts)
    for each in waiting(registry):
        decide(registry, each.run, each.adapter, reject=False, note="")


def test_killed_at_any_moment_each_challenger_is_approved_once(tmp_path: Path) -> None:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    artifacts = (tmp_path / "artifacts").as_uri()
    registry = Registry.open(url, artifacts)
    with registry.writing() as session:
        tenants.create(session, "acme")
        for name in NAMES:
            adapters.get_or_create(session, AdapterName.parse(name))
            for version in (FIRST, SECOND):
                record = VersionRecord(id=version, adapter=name, job=None, base="b" * 64, bytes=1, created_at=1.0)
                adapters.add_version(session, record)
            ask(session, name, SECOND, FIRST)
    kills, moments = 0, random.Random(17)
    while left := len(waiting(registry)):
        process = FORK.Process(target=approve_all, args=(url, artifacts))
        process.start()
        eventually(lambda left=left: len(waiting(registry)) <= max(0, left - 4))
        time.sleep(moments.random() * 0.05)  # into the next answers
        process.kill()
        process.join()
        kills += 1
    assert kills >= 2  # else no kill came in between
    with registry.reading() as session:
        changes = Counter((each.subject, each.action) for each in audit.list_changes(session, "acme", limit=1000))
        assert changes == {(name, "adapter.approve"): 1 for name in NAMES}
        for name in NAMES:
            moved = [each.version for each in adapters.alias_history(session, name) if each.alias is Alias.CHAMPION]
            assert moved == [SECOND, FIRST] and len(records.list_rollouts(session, name=name)) == 1
    registry.close()
