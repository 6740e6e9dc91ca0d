"""Nightly runs in processes that are killed at random points, and started again until they end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import NightlyBusy
from loramill.models.catalog import Base
from loramill.registry import adapters, nightly
from loramill.registry.database.tables import (
    AdapterContentRow,
    DatasetRow,
    EvaluationRow,
    JobRow,
    VersionRow,
)

from .simulation import TWELVE, Simulation, labeled, respelled, shuffled, simulate

#: Two that are promoted, one that is held, and one whose data is broken.
ADAPTERS = TWELVE[:4]
#: After this many kills, a process is left alone.
MOST_KILLS = 40
#: Exit status of a process that leaves the run to another one.
BUSY = 9
Create = Callable[[str], Simulation]


@pytest.fixture
def create(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Create:
    return lambda name: simulate(tmp_path / name, base, tokenizer, monkeypatch)


def work(folder: Path, kill_at: int | None, pool: Connection) -> None:
    """A run that is killed at one of its SQL statements, commits, and writes of artifacts, counted from 1."""
    points = itertools.count(1)

    def point(*_: object) -> None:
        if next(points) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", point)
    event.listen(Engine, "commit", point)
    simulation = Simulation(folder)
    simulation.check = partial(ask, pool)
    put = simulation.registry.artifacts.put

    def put_or_die(files: Any) -> str:
        point()
        stored = put(files)
        point()
        return stored

    simulation.registry.artifacts.put = put_or_die  # type: ignore[method-assign]
    try:
        simulation.run()
    except NightlyBusy:
        os._exit(BUSY)
    (folder / "points").write_text(str(next(points)))


def ask(pool: Connection) -> None:
    """Lets the pool train what is queued."""
    pool.send("train")
    pool.recv()


def work_in_process(
    simulation: Simulation, kill_at: int | None, *, before_training: Callable[[], None] = lambda: None
) -> bool:
    """Runs `work` while this process is the pool; returns whether it ended by itself."""
    context = multiprocessing.get_context("fork")
    pool, other_end = context.Pipe()
    process = context.Process(target=work, args=(simulation.settings.home, kill_at, other_end))
    process.start()
    other_end.close()
    with suppress(EOFError, BrokenPipeError):  # the process has ended
        while pool.recv():
            before_training()
            simulation.train_queued()
            pool.send("trained")
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


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
    for batch in (1, 2):
        for simulation in (unbroken, broken):
            feed(simulation, batch)
        assert work_in_process(unbroken, None)
        points = int((unbroken.settings.home / "points").read_text())
        while not work_in_process(broken, chance.randint(1, points // 3) if kills < MOST_KILLS else None):
            kills += 1
    assert kills >= 10
    assert state(broken) == state(unbroken)
    assert state(broken)["aside"] == [(ADAPTERS[3], "collect")]


def test_a_second_trigger_leaves_the_run_to_the_first(create: Create) -> None:
    simulation = create("home")
    feed(simulation, 1)
    ended: list[int | None] = []

    def trigger() -> None:
        context = multiprocessing.get_context("fork")
        second = context.Process(target=work, args=(simulation.settings.home, None, context.Pipe()[1]))
        second.start()
        second.join()
        ended.append(second.exitcode)

    assert work_in_process(simulation, None, before_training=trigger)
    assert len(ended) >= 2 and set(ended) == {BUSY}
    assert sorted(simulation.trained) == sorted(ADAPTERS)
    with simulation.registry.reading() as session:
        (run,) = nightly.list_runs(session)
    assert run.finished_at is not None
