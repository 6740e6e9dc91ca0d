"""What a nightly run does with its decisions: promotion, canary and watch, and pinned champions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramill.names import AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.outcome import outcomes
from loramill.pipelines.nightly.promote import promote_all
from loramill.registry import Registry, adapters, nightly, tenants
from loramill.registry.rollouts import records
from loramill.types import RolloutKind, StepStatus, VersionRecord

from ...databases import create_sqlite_database

FIRST, SECOND = "1" * 64, "2" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path / 'loramill.db'}"
    create_sqlite_database(url)
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    yield registry
    registry.close()


def decided(registry: Registry, name: str, *, promote: bool, definition: NightlyDefinition | None = None) -> None:
    """A nightly run up to the gate's decision on `name`."""
    with registry.writing() as session:
        run = nightly.open_run(session)
        for step, result in (
            ("train", {"version": SECOND}),
            ("gate", {"verdict": "promote" if promote else "hold", "reason": "it gains 0.100 over the champion"}),
        ):
            nightly.record_step(session, run.id, name, step, StepStatus.DONE, result)
    reports: list[Any] = []
    none: Any = SimpleNamespace()
    context = NightlyContext(run, registry, none, none, reports.append, none)
    promote_all(replace(context, definition=definition or NightlyDefinition()))
    assert reports[-1].step == "promote"


def challenged(registry: Registry) -> None:
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, AdapterName.parse("acme/a"))
        for version in (FIRST, SECOND):
            record = VersionRecord(id=version, adapter="acme/a", job=None, base="b" * 64, bytes=1, created_at=1.0)
            adapters.add_version(session, record)


@pytest.mark.parametrize(("pinned", "promotes"), [(True, False), (False, True)])
def test_a_pinned_champion_is_held_with_the_reason(registry: Registry, pinned: bool, promotes: bool) -> None:
    challenged(registry)
    if pinned:
        with registry.writing() as session:
            adapters.pin(session, "acme/a", FIRST, "by hand")
    decided(registry, "acme/a", promote=True)
    with registry.reading() as session:
        now = adapters.get(session, "acme/a")
        steps = nightly.list_steps(session, nightly.list_runs(session)[0].id)
    assert now.champion == (SECOND if promotes else FIRST)
    verdict = "promote" if promotes else "hold"
    assert steps[-1].result == {"promoted": promotes, "verdict": verdict, "champion": now.champion}
    (outcome,) = outcomes(steps)
    assert outcome.verdict == ("promoted" if promotes else "held")
    assert ("pinned" in outcome.reason) is not promotes


@pytest.mark.parametrize(
    ("sections", "kind", "share", "verdict"),
    [
        ({}, RolloutKind.WATCH, 1.0, "promoted"),
        ({"canary": {"share": 0.2}}, RolloutKind.CANARY, 0.2, "canary"),
        ({"canary": {"share": 0.2, "shadow": True}}, RolloutKind.SHADOW, 0.2, "shadow"),
        ({"canary": {"shadow": True}}, RolloutKind.SHADOW, 0.1, "shadow"),
        ({"watch": {"window": "0s"}}, None, 0.0, "promoted"),
    ],
)
def test_a_challenger_that_passes_is_introduced_as_defined(
    registry: Registry, sections: Any, kind: RolloutKind | None, share: float, verdict: str
) -> None:
    challenged(registry)
    watch = {"window": "10m", "min_requests": 7, "max_latency_ratio": 2} | sections.get("watch", {})
    decided(registry, "acme/a", promote=True, definition=NightlyDefinition.model_validate(sections | {"watch": watch}))
    with registry.reading() as session:
        (run,) = nightly.list_runs(session)
        found = records.list_rollouts(session, run=run.id)
        adapter = adapters.get(session, "acme/a")
        (outcome,) = outcomes(nightly.list_steps(session, run.id))
    assert outcome.verdict == verdict
    assert adapter.champion == (SECOND if verdict == "promoted" else FIRST)
    if kind is None:
        assert found == []
        return
    (rollout,) = found
    assert (rollout.kind, rollout.share, rollout.version, rollout.baseline) == (kind, share, SECOND, FIRST)
    assert rollout.ends_at == rollout.started_at + 600
    assert (rollout.policy.min_requests, rollout.policy.max_latency_ratio) == (7, 2)


def test_a_challenger_that_is_held_is_not_tried(registry: Registry) -> None:
    challenged(registry)
    definition = NightlyDefinition.model_validate({"canary": {"share": 0.2}})
    decided(registry, "acme/a", promote=False, definition=definition)
    with registry.reading() as session:
        assert records.list_open(session) == []
        assert adapters.get(session, "acme/a").challenger is None
