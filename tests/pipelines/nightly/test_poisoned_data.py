"""Three nightly runs over twelve tenants: from nothing, new data for half of them, and poisoned data for three."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.pipelines.nightly.outcome import Verdict, succeeded
from loramill.registry import datasets, nightly
from loramill.types import StepStatus

from .simulation import TWELVE, Simulation, example, labeled, respelled, shuffled, simulate


@pytest.fixture
def simulation(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    return simulate(tmp_path, base, tokenizer, monkeypatch)


def rows_of(simulation: Simulation, adapter: str, name: str) -> list[str]:
    """The questions of a dataset that the last run froze: `train`, or a slice."""
    with simulation.registry.reading() as session:
        steps = nightly.list_steps(session, nightly.list_runs(session, limit=1)[0].id)
        collected = next(step.result for step in steps if (step.adapter, step.step) == (adapter, "collect"))
        file = collected["spec"]["train"] if name == "train" else collected["slices"][name]
        artifact = datasets.get(session, file).artifact
    lines = simulation.registry.artifacts.read(artifact, "data.jsonl").splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def test_exactly_the_poisoned_adapters_are_held_or_quarantined(simulation: Simulation) -> None:
    for adapter in TWELVE:
        simulation.feed(adapter, labeled(adapter, 1))
    first = simulation.run()
    assert {name: each.verdict for name, each in first.items()} == dict.fromkeys(TWELVE, Verdict.PROMOTED)
    held_out = {adapter: rows_of(simulation, adapter, "new") for adapter in TWELVE}

    half = TWELVE[:6]
    for adapter in half:
        simulation.feed(adapter, labeled(adapter, 2))
    second = simulation.run()
    assert {name: each.verdict for name, each in second.items()} == dict.fromkeys(half, Verdict.PROMOTED)
    assert sorted(simulation.trained) == sorted(TWELVE + half)

    shuffles, leaks, breaks = TWELVE[0], TWELVE[4], TWELVE[8]
    champions = {adapter: simulation.champion(adapter) for adapter in TWELVE}
    simulation.feed(shuffles, shuffled(labeled(shuffles, 3, words_of=1), seed=3))
    answers = {row["messages"][0]["content"]: row for row in labeled(leaks, 1)}
    simulation.feed(leaks, [respelled(answers[question]) for question in held_out[leaks]], "leak.jsonl")
    broken = [b"{", b'{"messages": []}', b"\xff\xfe", b'{"prompt": "Q", "completion": ""}', b"[1, 2]"]
    simulation.feed(breaks, broken * 6, "broken.jsonl")
    clean = [adapter for adapter in TWELVE if adapter not in (shuffles, leaks, breaks)]
    for adapter in clean:
        simulation.feed(adapter, labeled(adapter, 3))
    third = simulation.run()

    assert {name: each.verdict for name, each in third.items()} == {
        **dict.fromkeys(clean, Verdict.PROMOTED),
        shuffles: Verdict.HELD,
        leaks: Verdict.SKIPPED,
        breaks: Verdict.FAILED,
    }
    assert "the champion" in third[shuffles].reason and "18 new examples" in third[shuffles].reason
    assert third[leaks].reason == f"nothing new: {len(held_out[leaks])} equal or similar to held-out examples."
    assert "30 of 30 rows are bad, more than 20%" in third[breaks].reason
    assert f"loramill nightly retry {breaks}" in third[breaks].reason
    assert not succeeded(list(third.values()))
    now = {adapter: simulation.champion(adapter) for adapter in TWELVE}
    assert [adapter for adapter in TWELVE if now[adapter] == champions[adapter]] == [shuffles, leaks, breaks]


def test_a_leak_among_clean_rows_is_left_out(simulation: Simulation) -> None:
    adapter = TWELVE[0]
    simulation.feed(adapter, labeled(adapter, 1))
    simulation.run()
    held_out = rows_of(simulation, adapter, "new")
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in labeled(adapter, 1)}
    simulation.feed(adapter, [*labeled(adapter, 2), *(example(f"{each} ?", answers[each]) for each in held_out)])
    outcome = simulation.run()[adapter]
    assert outcome.verdict is Verdict.PROMOTED
    assert outcome.counts.leaked == len(held_out) and outcome.counts.train + outcome.counts.held_out == 60
    assert not {f"{each} ?" for each in held_out} & set(rows_of(simulation, adapter, "train"))
    with simulation.registry.reading() as session:
        steps = nightly.list_steps(session, nightly.list_runs(session, limit=1)[0].id)
    assert [step.status for step in steps] == [StepStatus.DONE] * 5
