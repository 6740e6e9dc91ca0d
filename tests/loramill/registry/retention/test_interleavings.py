"""Pruning between, and within, any other changes: no alias, evaluation or job ever loses its version."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry import Registry, adapters, datasets, evaluations, jobs, migrate, tenants
from loramill.registry.database.tables import AliasRow, EvaluationRow, JobRow, VersionRow
from loramill.registry.retention import prune as pruning
from loramill.types import Alias, JobSpec, JobStatus, RetentionPolicy, VersionRecord

BASE = "b" * 64
_NUMBERS = count()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder: Path = tmp_path_factory.mktemp("interleavings")
    url = f"sqlite:///{folder / 'loramill.db'}"
    migrate(url)
    opened = Registry.open(url, folder.as_uri())
    with opened.writing() as session:
        tenants.create(session, "acme")
        datasets.create(session, "acme", "train.jsonl", "d" * 64, 10, 10)
    yield opened
    opened.close()


def change(session: Session, name: AdapterName, action: str, number: int) -> None:
    """Does one change of an adapter, with one of its versions."""
    if action == "publish":
        content = hashlib.sha256(f"{name} {number}".encode()).hexdigest()  # of some of these, again and again
        record = VersionRecord(id=content, adapter=str(name), job=None, base=BASE, bytes=1, created_at=time.time())
        adapters.add_version(session, record)
        return
    versions = adapters.list_versions(session, name)
    if not versions:
        return
    version = versions[number % len(versions)].id
    if action == "promote":
        adapters.promote(session, name, version, "test")
    elif action == "rollback" and adapters.get(session, name).previous is not None:
        adapters.rollback(session, name, "test")
    elif action == "challenge" and adapters.get(session, name).champion != version:
        adapters.move(session, name, Alias.CHALLENGER, version, "test")
    elif action == "evaluate":
        evaluations.add(session, name, version, "file-x", "new", 3, {"exact_match": 1.0})
    elif action == "start":
        file = datasets.list_datasets(session, "acme", None, 1)[0].id
        values = {"base": BASE, "adapter": str(name), "train": file, "steps": 5, "batch_size": 2}
        jobs.submit(session, JobSpec.model_validate(values | {"start_from": version}), {})


def check(session: Session, name: AdapterName) -> None:
    """Fails if anything refers to a version that is not there."""
    existing = {(row.adapter, row.id) for row in session.scalars(select(VersionRow))}
    for table in (AliasRow, EvaluationRow):
        assert set(session.execute(select(table.adapter, table.version)).tuples()) <= existing
    starts = select(JobRow.spec["start_from"].as_string()).where(JobRow.status == JobStatus.QUEUED)
    assert set(session.scalars(starts)) <= {id_ for _, id_ in existing}


CHANGES = st.tuples(
    st.sampled_from(["publish", "publish", "promote", "rollback", "challenge", "evaluate", "start"]), st.integers(0, 6)
)
POLICIES = st.builds(
    RetentionPolicy, keep_versions=st.none() | st.integers(1, 2), version_days=st.none() | st.just(1e-9)
)
#: A change, or a pruning within which another change is done after the plan was made.
STEPS = st.lists(CHANGES | st.tuples(POLICIES, CHANGES), min_size=3, max_size=14)


def prune_around(registry: Registry, policy: RetentionPolicy, change_between: Callable[[], None]) -> None:
    """Prunes, with a change between the plan and the removal."""
    planned = pruning.plan
    with pytest.MonkeyPatch.context() as patch:

        def plan_then_change(*arguments: Any, **options: Any) -> Any:
            found = planned(*arguments, **options)
            patch.setattr(pruning, "plan", planned)
            change_between()
            return found

        patch.setattr(pruning, "plan", plan_then_change)
        pruning.prune(registry, policy, now=time.time(), tenant="acme")


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_pruning_at_any_moment_takes_nothing_that_is_referred_to(registry: Registry, steps: list[Any]) -> None:
    name = AdapterName("acme", f"a{next(_NUMBERS)}")
    with registry.writing() as session:
        adapters.get_or_create(session, name)

    def do(action: str, number: int) -> None:
        with registry.writing() as session:
            change(session, name, action, number)

    for first, second in steps:
        if isinstance(first, str):
            do(first, second)
        else:
            prune_around(registry, first, partial(do, *second))
        with registry.reading() as session:
            check(session, name)
