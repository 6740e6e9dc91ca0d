"""Rollouts as nightly runs report them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.names import AdapterName
from loramill.pipelines.nightly.rollouts.advance import advance
from loramill.pipelines.nightly.rollouts.overview import UNDER_WAY, rollouts_around
from loramill.registry import Registry, adapters, nightly, tenants
from loramill.registry.rollouts import moves, traffic
from loramill.registry.rollouts.traffic import TrafficKey, period_of
from loramill.types import NightlyRun, RolloutKind, TrafficCounts, VersionRecord, WatchPolicy
from loramill.types.rollouts import latency_bucket

from ....databases import create_sqlite_database

OLD, NEW = "1" * 64, "2" * 64
POLICY = WatchPolicy(window_seconds=600)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    opened = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with opened.writing() as session:
        tenants.create(session, "acme")
        for name in ("acme/a", "acme/b"):
            adapters.get_or_create(session, AdapterName.parse(name))
            for version in (OLD, NEW):
                record = VersionRecord(id=version, adapter=name, job=None, base="b" * 64, bytes=1, created_at=1.0)
                adapters.add_version(session, record)
    yield opened
    opened.close()


def finished_run(registry: Registry, start: float) -> NightlyRun:
    with registry.writing() as session:
        run = nightly.open_run(session)
        moves.promote_watched(session, "acme/a", NEW, "better", policy=POLICY, run=run.id, now=start)
        moves.start_canary(session, "acme/b", share=0.2, policy=POLICY, promote_at_end=True, run=run.id, now=start)
        return nightly.finish_run(session, run.id)


def test_a_run_lists_its_rollouts_with_numbers_and_reasons(registry: Registry) -> None:
    with registry.writing() as session:
        start = nightly.open_run(session).created_at
    run = finished_run(registry, start)
    seconds = {latency_bucket(0.2): 60}
    with registry.writing() as session:
        written = {
            TrafficKey("acme/a", NEW, period_of(start)): TrafficCounts(requests=60, empty=60, total_histogram=seconds),
            TrafficKey("acme/a", OLD, period_of(start)): TrafficCounts(requests=90, total_histogram=seconds),
            TrafficKey("acme/b", NEW, period_of(start)): TrafficCounts(requests=7),
        }
        traffic.write(session, "g1", written)
    advance(registry, start + 5)
    with registry.reading() as session:
        canary, watch = rollouts_around(session, run, start + 10)
    assert (canary.adapter, canary.kind, canary.state, canary.share) == ("acme/b", RolloutKind.CANARY, UNDER_WAY, 0.2)
    assert canary.reason == "7 requests so far, of at least 50"
    assert (watch.adapter, watch.state, watch.tried.requests, watch.tried.empty) == ("acme/a", "rolled back", 60, 60)
    assert watch.compared is not None and (watch.compared.requests, watch.compared.version) == (90, OLD)
    assert "empty answers rose from 0.0% to 100.0%" in watch.reason
    assert watch.tried.seconds == pytest.approx(0.2, rel=0.2)


def test_the_next_run_lists_what_ended_since_the_last_one(registry: Registry) -> None:
    with registry.writing() as session:
        start = nightly.open_run(session).created_at
    first = finished_run(registry, start)
    with registry.writing() as session:
        adapters.rollback(session, "acme/a", "by hand")  # ends the watch now, after the run
        second = nightly.finish_run(session, nightly.open_run(session).id)
        third = nightly.finish_run(session, nightly.open_run(session).id)
    later = start + 1000
    with registry.reading() as session:
        shown = {run.id: rollouts_around(session, run, later) for run in (first, second, third)}
    assert [(each.adapter, each.state) for each in shown[first.id]] == [
        ("acme/b", UNDER_WAY),
        ("acme/a", "rolled back"),
    ]
    assert [(each.adapter, each.state) for each in shown[second.id]] == [
        ("acme/b", UNDER_WAY),
        ("acme/a", "rolled back"),
    ]
    assert [each.adapter for each in shown[third.id]] == ["acme/b"]


def test_a_canary_by_hand_is_listed_before_the_first_run(registry: Registry) -> None:
    with registry.writing() as session:
        for name in ("acme/a", "acme/b"):
            moves.start_canary(session, name, share=0.2, policy=POLICY, promote_at_end=False, now=time.time())
        moves.end_canary(session, "acme/b", "ended by hand")
    with registry.reading() as session:
        assert [(each.adapter, each.state) for each in rollouts_around(session, None, time.time())] == [
            ("acme/a", UNDER_WAY)
        ]
