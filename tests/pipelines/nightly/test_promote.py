"""A nightly run with an adapter whose champion is pinned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramill.names import AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.outcome import outcomes
from loramill.pipelines.nightly.promote import promote_all
from loramill.registry import Registry, adapters, nightly, tenants
from loramill.types import StepStatus, VersionRecord

from ...databases import create_sqlite_database

FIRST, SECOND = "1" * 64, "2" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path / 'loramill.db'}"
    create_sqlite_database(url)
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    yield registry
    registry.close()


def decided(registry: Registry, name: str, *, promote: bool) -> None:
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
    promote_all(NightlyContext(run, registry, none, none, reports.append, none))
    assert reports[-1].step == "promote"


@pytest.mark.parametrize(("pinned", "promotes"), [(True, False), (False, True)])
def test_a_pinned_champion_is_held_with_the_reason(registry: Registry, pinned: bool, promotes: bool) -> None:
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, AdapterName.parse("acme/a"))
        for version in (FIRST, SECOND):
            record = VersionRecord(id=version, adapter="acme/a", job=None, base="b" * 64, bytes=1, created_at=1.0)
            adapters.add_version(session, record)
        if pinned:
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
