"""Nightly runs in processes that are killed at random points, and started again until they end."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.registry import adapters, nightly
from loramill.registry.database.tables import (
    AdapterContentRow,
    DatasetRow,
    EvaluationRow,
    JobRow,
    VersionRow,
)

from .killed_runs import BUSY, RunStarter
from .simulation import TWELVE, Simulation, labeled, respelled, shuffled, simulate

#: Two that are promoted, one that is held, and one whose data is broken.
ADAPTERS = TWELVE[:4]
#: After this many kills, a process is left alone.
MOST_KILLS = 40
Create = Callable[[str], Simulation]


@pytest.fixture
def create(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Create:
    return lambda name: simulate(tmp_path / name, base, tokenizer, monkeypatch)


def feed(simulation: Simulation, batch: int) -> None:
    held, broken = ADAPTERS[2:]
    for adapter in ADAPTERS[:2]:
        simulation.feed(adapter, labeled(adapter, batch))
    rows = labeled(held, batch, words_of=1)
    simulation.feed(held, rows if batch == 1 else shuffled(rows, seed=batch))
    simulation.feed(broken, labeled(broken, batch) if batch == 1 else [b"{"] * 20)
    simulation.feed(ADAPTERS[0], [respelled(row) for row in labeled(ADAPTERS[0], batch)[:20]], "again.jsonl")


def state(simulation: Simulation) -> dict[str, Any]:
    """All that runs leave behind, without times and random names."""
    with simulation.registry.reading() as session:
        count = {
            row.__tablename__: session.scalar(select(func.count()).select_from(row))
            for row in (DatasetRow, JobRow, VersionRow, EvaluationRow, AdapterContentRow)
        }
        found: dict[str, Any] = {"count": count, "pending": nightly.pending_data(session)}
        found["aside"] = [(each.adapter, each.stage) for each in nightly.list_set_aside(session)]
        for adapter in ADAPTERS:
            record = adapters.get(session, adapter)
            changes = [
                (each.alias, each.version, re.sub(r"\S*-[0-9a-f]{12,}", "", each.reason))
                for each in adapters.alias_history(session, adapter)
            ]
            found[adapter] = (record.champion, record.previous, record.challenger, changes)
        found["steps"] = [
            (index, step.adapter, step.step, step.status)
            for index, run in enumerate(
                run for run in nightly.list_runs(session) if nightly.list_steps(session, run.id)
            )
            for step in sorted(nightly.list_steps(session, run.id), key=lambda each: (each.adapter, each.step))
        ]
    return found


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_points_ends_as_an_unbroken_one(create: Create, seed: int) -> None:
    unbroken, broken = create("unbroken"), create("broken")
    chance, kills = random.Random(seed), 0
    with RunStarter(unbroken) as starter, RunStarter(broken) as killed:
        for batch in (1, 2):
            for simulation in (unbroken, broken):
                feed(simulation, batch)
            assert starter.run() == 0
            points = int((unbroken.settings.home / "points").read_text())
            while status := killed.run(chance.randint(1, points // 3) if kills < MOST_KILLS else None):
                assert status == -signal.SIGKILL
                kills += 1
    assert kills >= 10
    assert state(broken) == state(unbroken)
    assert state(broken)["aside"] == [(ADAPTERS[3], "collect")]


def test_a_second_trigger_leaves_the_run_to_the_first(create: Create) -> None:
    simulation = create("home")
    feed(simulation, 1)
    ended: list[int] = []
    with ExitStack() as stack:
        first, second = (stack.enter_context(RunStarter(simulation)) for _ in range(2))
        assert first.run(before_training=lambda: ended.append(second.run())) == 0
    assert len(ended) >= 2 and set(ended) == {BUSY}
    assert sorted(simulation.trained) == sorted(ADAPTERS)
    with simulation.registry.reading() as session:
        (run,) = nightly.list_runs(session)
    assert run.finished_at is not None
