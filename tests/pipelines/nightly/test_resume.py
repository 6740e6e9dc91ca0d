"""Runs that were interrupted, finished by another release, or reopened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DiskFull, Unavailable
from loramill.models.catalog import Base
from loramill.pipelines.nightly import run
from loramill.pipelines.nightly.outcome import Verdict
from loramill.registry import nightly, nightly_again
from loramill.types import NightlyRun, NightlyStep, StepStatus

from .simulation import TWELVE, Simulation, labeled, simulate

ADAPTER = TWELVE[0]


@pytest.fixture
def simulation(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    found = simulate(tmp_path, base, tokenizer, monkeypatch)
    found.feed(ADAPTER, labeled(ADAPTER, 1))
    return found


def stopped_before(simulation: Simulation, stage: str, patch: pytest.MonkeyPatch) -> str:
    """A run that stops before a stage; its ID."""

    def stop(*_: object) -> None:
        raise Unavailable("The database does not answer.")

    with patch.context() as patched:
        patched.setattr(run, stage, stop)
        with pytest.raises(Unavailable):
            simulation.run()
    with simulation.registry.reading() as session:
        return nightly.list_runs(session)[0].id


def record(simulation: Simulation, nightly_run: str, step: str, result: dict[str, object]) -> None:
    with simulation.registry.writing() as session:
        nightly.record_step(session, nightly_run, ADAPTER, step, StepStatus.DONE, result)


def test_a_run_that_is_killed_while_it_is_published_is_published_again(simulation: Simulation) -> None:
    published: list[NightlyRun] = []

    def publish(run: NightlyRun, deleted: Sequence[NightlyStep]) -> None:
        published.append(run)
        if len(published) == 1:
            raise KeyboardInterrupt

    simulation.publish = publish
    with pytest.raises(KeyboardInterrupt):
        simulation.run()
    with simulation.registry.reading() as session:
        assert nightly.list_runs(session)[0].finished_at is None, "it is resumed"
    assert simulation.run()[ADAPTER].verdict is Verdict.PROMOTED and simulation.trained == [ADAPTER]
    assert published[0].id == published[1].id and all(each.finished_at for each in published)


@pytest.mark.parametrize("decided", [False, True])
def test_a_run_of_an_older_release_is_evaluated_and_decided_again(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, decided: bool
) -> None:
    nightly_run = stopped_before(simulation, "promote_all" if decided else "gate_all", monkeypatch)
    means = {"examples": 18, "exact_match": 0.9, "token_f1": 0.9, "rouge_l": 0.9}
    record(simulation, nightly_run, "evaluate", {"new": {"base": means, "challenger": means}})
    if decided:
        record(simulation, nightly_run, "gate", {"promote": False, "reason": "it gains 0.000"})
    assert simulation.run()[ADAPTER].verdict is Verdict.PROMOTED and simulation.trained == [ADAPTER]


def test_an_older_release_that_ended_is_left_alone(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    nightly_run = stopped_before(simulation, "forget_older_steps", monkeypatch)
    for step, result in {
        "collect": {"champion": None, "slices": {}},
        "train": {"job": "ftjob-1", "version": "0" * 64},
        "evaluate": {"new": {}},
        "gate": {"promote": False, "reason": "it gains 0.000"},
        "promote": {"promoted": False, "champion": None},
    }.items():
        record(simulation, nightly_run, step, result)
    outcome = simulation.run()[ADAPTER]
    assert (outcome.verdict, outcome.reason) == (Verdict.HELD, "it gains 0.000") and simulation.trained == []


def test_a_run_that_is_reopened_has_its_budget_of_time_again(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    (simulation.settings.nightly_file).write_text("split: {held_out: 0.3}\nbudget: {wall_time: 2h}\n")
    assert simulation.run()[ADAPTER].verdict is Verdict.PROMOTED
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    with simulation.registry.writing() as session:
        nightly_run = nightly.list_runs(session)[0].id
        nightly_again.reopen_run(session, nightly_run, ("train", "evaluate", "gate", "promote"))
    assert simulation.run()[ADAPTER].stage == "promote" and simulation.trained == [ADAPTER] * 2
    with simulation.registry.reading() as session:
        assert nightly.list_runs(session)[0].created_at == later


def test_a_promoted_version_that_is_decided_again_stays_the_champion(simulation: Simulation) -> None:
    simulation.run()
    simulation.feed(ADAPTER, labeled(ADAPTER, 2))
    assert simulation.run()[ADAPTER].verdict is Verdict.PROMOTED
    champion = simulation.champion(ADAPTER)
    simulation.settings.nightly_file.write_text("gate: {confidence: 0.99999999}\n")
    with simulation.registry.writing() as session:
        nightly_again.reopen_run(session, nightly.list_runs(session)[0].id, ("gate", "promote"))
    held = simulation.run()[ADAPTER]
    assert held.verdict is Verdict.HELD and simulation.champion(ADAPTER) == champion
    assert held.reason.endswith(f"it was promoted before and stays the champion, until `loramill rollback {ADAPTER}`")


def test_a_full_disk_loses_no_data(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> str:
        raise DiskFull("The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(simulation.registry.artifacts, "put", full)
        failed = simulation.run()[ADAPTER]
    assert failed.verdict is Verdict.FAILED
    assert failed.reason == "collect: The disk is full. Its data waits for the next nightly run."
    assert simulation.run()[ADAPTER].verdict is Verdict.PROMOTED
