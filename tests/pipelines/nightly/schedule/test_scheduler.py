"""The scheduler with a fake clock and a real registry; its processes are objects of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

from loramill.errors import Unavailable
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.definition.file import DefinitionFile
from loramill.pipelines.nightly.schedule import scheduler as module
from loramill.pipelines.nightly.schedule.scheduler import RESUME_SECONDS, NightlyScheduler
from loramill.registry import Registry, nightly, nightly_schedule
from loramill.settings import Settings

from ....databases import create_sqlite_database

DAY = 86_400.0


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@dataclass
class Process:
    """A process that works until the test ends it."""

    definition: NightlyDefinition
    status: int | None = None
    stopped: bool = False

    def poll(self) -> int | None:
        return self.status

    def stop(self) -> None:
        self.stopped = True


@dataclass
class World:
    """A registry, a clock, nightly.yaml, and the processes that schedulers started."""

    registry: Registry
    settings: Settings
    now: float = field(default_factory=lambda: at("2026-06-01T12:00Z"))
    processes: list[Process] = field(default_factory=list)

    def scheduler(self) -> NightlyScheduler:
        return NightlyScheduler(self.registry, DefinitionFile(self.settings), self.start, clock=lambda: self.now)

    def start(self, definition: NightlyDefinition) -> Process:
        self.processes.append(Process(definition))
        return self.processes[-1]

    def write(self, text: str) -> None:
        self.settings.nightly_file.write_text(text)

    def runs(self) -> list[str]:
        with self.registry.reading() as session:
            return [run.id for run in nightly.list_runs(session)][::-1]

    def times(self) -> list[float]:
        """The scheduled times that have runs."""
        with self.registry.reading() as session:
            return [each.scheduled_at for run in self.runs() for each in nightly_schedule.list_times(session, run)]

    def lease(self, holder: str) -> str:
        with self.registry.writing() as session:
            return nightly_schedule.lease_run(session, holder, now=self.now, seconds=60).id

    def finish(self) -> None:
        """The open run ends, and so does its process."""
        with self.registry.writing() as session:
            nightly.finish_run(session, nightly.open_run(session).id)
        for process in self.processes:
            process.status = 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    world = World(registry, Settings.load(home=tmp_path))
    world.write("schedule: {timezone: Europe/Berlin}\n")
    yield world
    registry.close()


def test_without_a_file_nothing_starts(world: World) -> None:
    world.settings.nightly_file.unlink()
    scheduler = world.scheduler()
    for _ in range(3):
        scheduler.look()
        world.now += 2 * DAY
    assert world.runs() == [] and world.processes == []
    with world.registry.reading() as session:
        assert nightly_schedule.schedule_state(session, world.now).last_time is None


def test_each_scheduled_time_has_one_run_over_a_change_of_clocks(world: World) -> None:
    world.now = at("2026-03-27T12:00+01:00")
    scheduler = world.scheduler()
    while world.now < at("2026-03-31T06:00+02:00"):
        scheduler.look()
        if world.processes and world.processes[-1].status is None:
            world.finish()
        world.now += 240
    assert world.times() == [
        at("2026-03-28T02:00+01:00"),
        at("2026-03-29T03:00+02:00"),  # 02:00 does not exist
        at("2026-03-30T02:00+02:00"),
        at("2026-03-31T02:00+02:00"),
    ]
    assert len(world.processes) == len(world.runs()) == 4


def test_a_time_that_was_missed_over_a_change_of_clocks_is_skipped_or_caught_up(world: World) -> None:
    for missed, begun in (("skip", []), ("once", [at("2026-10-25T02:30+02:00")])):  # 02:30 occurs twice
        world.write(f"schedule: {{cron: 30 2 * * *, timezone: Europe/Berlin, missed: {missed}}}\n")
        world.now = at("2026-10-24T12:00+02:00")
        scheduler = world.scheduler()
        scheduler.look()
        world.now = at("2026-10-25T02:30+01:00")  # an hour after the first 02:30
        for _ in range(3):
            scheduler.look()
            world.now += 60
        assert world.times() == begun and len(world.processes) == len(begun)
    world.finish()
    world.now = at("2026-10-26T02:30+01:00")
    scheduler.look()
    assert world.times() == [*begun, world.now]


def test_two_schedulers_make_one_run_of_each_time(world: World) -> None:
    schedulers = [world.scheduler(), world.scheduler()]
    for _ in range(4 * 24):
        for scheduler in schedulers:
            scheduler.look()
        if world.processes and world.processes[-1].status is None:
            world.lease("process")
            world.finish()
        world.now += 3600
    assert len(world.times()) == len(set(world.times())) == len(world.runs()) == 4


def test_a_time_is_missed_only_while_the_schedule_exists(world: World) -> None:
    world.scheduler().look()  # records when the schedule began
    world.now += 10 * DAY
    world.scheduler().look()
    (time,) = world.times()
    assert time == at("2026-06-11T02:00+02:00")
    with world.registry.reading() as session:
        assert nightly_schedule.list_times(session, world.runs()[0])[0].missed == 9
    assert len(world.processes) == 1
    world.finish()
    world.write("schedule: {cron: 0 3 * * *}\n")
    for scheduler in (world.scheduler(), world.scheduler()):
        scheduler.look()
    assert len(world.runs()) == 1
    world.write("schedule: {enabled: false}\n")
    world.scheduler().look()
    world.now += DAY
    world.write("schedule: {cron: 0 3 * * *}\n")
    for scheduler in (world.scheduler(), world.scheduler()):
        scheduler.look()  # the time while it was disabled is not caught up
    assert len(world.runs()) == 1
    world.now += DAY
    world.scheduler().look()
    assert len(world.runs()) == 2


def test_a_run_by_hand_is_waited_for_and_one_after_the_time_stands_for_it(world: World) -> None:
    scheduler = world.scheduler()
    scheduler.look()
    world.now = at("2026-06-02T01:59:50+02:00")
    world.lease("by hand")
    world.now += 20
    scheduler.look()
    assert world.processes == []  # it began before the time, and works
    world.finish()
    scheduler.look()
    assert len(world.processes) == 1 and world.times() == [at("2026-06-02T02:00+02:00")]
    world.finish()
    world.now = at("2026-06-03T02:00:05+02:00")
    world.lease("by hand")
    world.finish()
    scheduler.look()
    assert len(world.processes) == 1


def test_an_interrupted_scheduled_run_is_resumed_after_a_pause(world: World) -> None:
    world.scheduler().look()
    world.now = at("2026-06-02T02:00+02:00")
    scheduler = world.scheduler()
    scheduler.look()
    world.processes[0].status = 3
    scheduler.look()
    assert len(world.processes) == 1
    world.now += RESUME_SECONDS
    scheduler.look()
    assert len(world.processes) == 2 and len(world.runs()) == 1
    # The scheduler is killed; its successor resumes the run at once.
    world.scheduler().look()
    assert len(world.processes) == 3 and len(world.runs()) == 1
    # While a process works on it, no other is started.
    world.lease("process")
    world.scheduler().look()
    assert len(world.processes) == 3


def test_a_broken_file_is_logged_and_the_last_good_one_is_kept(world: World, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = world.scheduler()
    scheduler.look()
    world.write("schedules: {}\n")
    world.now = at("2026-06-02T02:00+02:00")
    scheduler.look()
    (process,) = world.processes
    assert process.definition.schedule.timezone == "Europe/Berlin"
    assert "nightly.yaml:1: schedules is not a key; did you mean schedule?" in caplog.text
    world.finish()
    world.write("schedule: {timezone: Europe/Berlin}\nbudget: {tokens: 5}\n")
    world.now += DAY
    for _ in range(2):
        scheduler.look()
    assert world.processes[-1].definition.budget.tokens == 5


def test_an_outage_of_the_database_ends_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, stop = world.scheduler(), threading.Event()
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 1:
            raise Unavailable("The database does not answer.")
        if len(looks) == 2:
            raise ZeroDivisionError
        world.start(NightlyDefinition())
        scheduler._process = world.processes[-1]
        stop.set()

    monkeypatch.setattr(scheduler, "look", look)
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.001)
    scheduler.run(stop)
    assert len(looks) == 3 and world.processes[-1].stopped  # a process does not outlive its scheduler


@pytest.mark.parametrize("crash", range(6))
def test_a_scheduler_killed_anywhere_makes_no_second_run(
    world: World, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """Each write of the registry, and the start of the process, may be the last thing that it does."""
    calls = [0]

    def killed(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == crash:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return wrapped

    world.scheduler().look()
    world.now = at("2026-06-02T02:00+02:00")
    for name in ("schedule_state", "claim_time"):
        monkeypatch.setattr(nightly_schedule, name, killed(getattr(nightly_schedule, name)))
    monkeypatch.setattr(world, "start", killed(world.start))
    for _ in range(3):
        scheduler = world.scheduler()
        try:
            scheduler.look()
            scheduler.look()
        except KeyboardInterrupt:
            continue
    assert len(world.runs()) == 1 and world.times() == [world.now]
