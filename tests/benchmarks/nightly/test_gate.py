"""The simulated nightly runs of `loramill-bench nightly`, with scores made up for the test."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loramill.errors import SetupError
from loramill_bench import cli
from loramill_bench.nightly import gate

CHAMPION = [1.0] * 40 + [0.0] * 10
#: Better on 2 of 50 examples, worse on 1.
CHALLENGER = [0.0] + [1.0] * 41 + [0.0] * 8
SCORES = {
    "base": [0.0] * 50,
    "champion": CHAMPION,
    "challenger 1": CHALLENGER,
    "challenger 2": CHALLENGER,
    "spoiled": [0.0] * 25 + [1.0] * 25,
}
MEASURED = [{name: {each: np.array(row) for each, row in SCORES.items()} for name in ("test", "shuffled")}]


def test_equally_good_versions_are_swapped_at_random() -> None:
    means = []
    for seed in range(40):
        new, old = gate.without_gain(MEASURED, 100, np.random.default_rng(seed))
        assert (new.kind, old.kind, len(new.examples), len(old.examples)) == ("new", "old", 100, 100)
        differences = [each.challenger - (each.champion or 0.0) for each in new.examples]
        means.append(np.mean(differences))
        assert 0 < sum(each != 0 for each in differences) < 20
    assert abs(np.mean(means)) < 0.01 and min(means) < 0 < max(means)


@pytest.mark.parametrize("differ", [False, True])
def test_a_gain_is_on_new_examples_alone(differ: bool) -> None:
    drawn = [gate.with_gain(MEASURED, 100, 0.2, differ, np.random.default_rng(seed)) for seed in range(40)]
    gains = [np.mean([each.challenger - (each.champion or 0.0) for each in new.examples]) for new, _ in drawn]
    lost = [np.mean([each.challenger - (each.champion or 0.0) for each in old.examples]) for _, old in drawn]
    assert np.mean(gains) == pytest.approx(0.2, abs=0.02) and abs(np.mean(lost)) < 0.01
    assert any(lost) is differ


def test_rates_count_the_gates_decisions() -> None:
    assert gate.promoted(partial(gate.with_gain, MEASURED, 60, 0.5, False), 5) == 1.0
    assert gate.promoted(partial(gate.with_shuffled_labels, MEASURED, 60), 5) == 0.0
    assert 0 < gate.evaluated(partial(gate.without_gain, MEASURED, 40), 3) < 1


def test_the_command_names_missed_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"acme": {references: {"token_f1": SCORES} for references in ("test", "shuffled")}}
    (tmp_path / "scores.json").write_text(json.dumps(measured))
    monkeypatch.setattr(gate, "FILE", tmp_path / "scores.json")
    monkeypatch.setattr(gate, "RUNS", 2)
    monkeypatch.setattr(gate, "RUNS", 2)
    monkeypatch.setattr(gate, "EXAMPLES", 40)
    monkeypatch.setattr(gate, "POWER", 1.1)
    ran = CliRunner().invoke(cli.app, ["nightly", "--only", "token", "--check"])
    assert ran.exit_code == 1 and "Missed targets: gate token_f1: promoted with a gain of 5 points alone" in ran.stderr
    assert "examples on which equally good versions differ" in ran.stdout


def test_scores_that_were_not_measured_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "FILE", tmp_path / "scores.json")
    with pytest.raises(SetupError, match="measure the scores first"):
        gate.results("token_f1")
