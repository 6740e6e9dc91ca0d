"""`loramill-bench quality`: what is trained, its targets, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramill.errors import InvalidRequest, JobError
from loramill.models.smollm2 import NAME
from loramill.pipelines.compare.types import ComparisonRow, Task
from loramill.pipelines.nightly.text_metrics import Score
from loramill.settings import Settings
from loramill_bench.cli import app
from loramill_bench.quality import preferences
from loramill_bench.quality import run as quality
from loramill_bench.quality.preferences import PreferenceScores

LORA = {"clinc-travel": 0.95, "clinc-banking": 0.85, "sgd-hotels1": 0.5, "e2e-restaurants": 0.4}
OTHER = {"lora": 0.0, "qlora": -0.03, "dora": 0.01, "adalora": -0.021}


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    for tenant in quality.TARGETS:
        (tmp_path / tenant).mkdir()
        for name in ("train", "valid", "test"):
            (tmp_path / tenant / f"{name}.jsonl").touch()
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Makes each method reach a given score, in the metric of the tenant; returns the tasks."""
    tasks: list[Task] = []

    def run(task: Task, report=lambda stage: None) -> ComparisonRow:
        tasks.append(task)
        tenant = task.train.parent.name
        value = LORA[tenant] + OTHER[task.subject]
        scores = (0.01, value) if tenant == "e2e-restaurants" else (value, 0.01)
        return ComparisonRow(subject=task.subject, quality=Score(200, scores[0], 0.02, scores[1]))

    def together(tasks: dict[str, Task], report) -> dict[str, Score]:
        assert {task.subject for task in tasks.values()} == {"lora"}
        return {tenant: Score(200, LORA[tenant], 0.02, 0.37) for tenant in tasks}

    def preferred(task: Task, report) -> PreferenceScores:
        assert task.subject == "lora"
        good = task.train.parent.name == "clinc-travel"
        return PreferenceScores(0.95 if good else 0.85, supervised=0.96, preferred=0.945 if good else 0.935)

    monkeypatch.setattr(quality, "run_task", run)
    monkeypatch.setattr(quality, "train_and_score", together)
    monkeypatch.setattr(quality, "tune_and_score", preferred)
    return tasks


def test_all_defaults_are_trained_once_and_compared_with_the_targets(tenants: Path, trained: list[Task]) -> None:
    groups: list[str] = []
    found = {each.case: each for each in quality.run(tenants, Settings(), "", groups.append)}
    assert len(trained) == len({(task.train, task.subject) for task in trained}) == 16
    assert len({task.folder for task in trained}) == 16
    assert groups[:2] == ["clinc-travel lora", "clinc-travel qlora"]
    for task in trained:
        assert (task.steps, task.batch_size, task.rank, task.learning_rate, task.serving) == (None,) * 4 + (False,)
        assert task.test == task.train.with_name("test.jsonl")
    assert found["clinc-travel lora: exact match"].met is True
    assert found["clinc-banking lora: exact match"].met is False
    assert found["sgd-hotels1 lora: exact match"].met is True
    assert found["e2e-restaurants lora: rouge l"].value == pytest.approx(0.4)
    assert found["e2e-restaurants lora: rouge l"].met is True
    assert found["clinc-travel qlora: above LoRA"].value == pytest.approx(-3)
    assert found["clinc-travel dora: above LoRA"].met is True
    assert found["clinc-travel adalora: above LoRA"].met is False
    assert found["clinc-travel adalora: exact match"].met is None
    together = {name: each.met for name, each in found.items() if "together" in name}
    assert together == {
        "clinc-travel together: exact match": True,
        "clinc-banking together: exact match": False,
        "sgd-hotels1 together: exact match": True,
        "e2e-restaurants together: rouge l": False,
    }
    assert {name: each.met for name, each in found.items() if "preferences" in name} == {
        "clinc-travel preferences: reward accuracy": True,
        "clinc-travel preferences: exact match": None,
        "clinc-travel preferences: above supervised": True,
        "clinc-banking preferences: reward accuracy": False,
        "clinc-banking preferences: exact match": None,
        "clinc-banking preferences: above supervised": False,
    }


def test_a_method_with_a_target_relative_to_lora_trains_lora_too(tenants: Path, trained: list[Task]) -> None:
    found = quality.run(tenants, Settings(), "hotels1 dora", lambda group: None)
    assert [task.subject for task in trained] == ["dora", "lora"]
    assert [each.case for each in found] == ["sgd-hotels1 dora: exact match", "sgd-hotels1 dora: above LoRA"]


def test_a_folder_without_the_tenants_is_refused(tenants: Path, trained: list[Task]) -> None:
    (tenants / "clinc-travel" / "valid.jsonl").unlink()
    with pytest.raises(InvalidRequest, match=r"has no clinc-travel/valid\.jsonl"):
        quality.run(tenants, Settings(), "", lambda group: None)
    assert not trained


def test_a_failed_training_is_an_error(tenants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "run_task", lambda task: ComparisonRow(subject=task.subject, error="Memory ran out."))
    with pytest.raises(JobError, match="LoRA on clinc-travel: Memory ran out"):
        quality.run(tenants, Settings(), "", lambda group: None)


@pytest.mark.parametrize(("only", "code"), [("clinc-travel lora", 0), ("clinc-banking lora", 1)])
def test_check_exits_with_1_if_a_target_is_missed(only: str, code: int, tenants: Path, trained: list[Task]) -> None:
    file = tenants / "all.json"
    arguments = ("--tenants", str(tenants), "--only", only, "--json", str(file), "--check")
    result = CliRunner().invoke(app, ["quality", *arguments])
    assert result.exit_code == code, result.output
    assert ("Missed targets" in result.stderr) == bool(code)
    assert json.loads(file.read_text())[0]["target"] == 0.9


def test_preferences_are_trained_from_the_supervised_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real base, engine and trainer, on a few examples and steps."""
    colors = {"red": "alpha", "blue": "kilo", "green": "tango", "white": "sierra"}
    rows = [
        {"messages": [{"role": "user", "content": f"a {color} {thing}"}, {"role": "assistant", "content": code}]}
        for color, code in colors.items()
        for thing in ("mug", "rope")
    ]
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(preferences, "_dpo_spec", shortened(preferences._dpo_spec))
    task = Task(
        subject="lora",
        base=NAME,
        cache=Settings.load().cache,
        **{name: tmp_path / f"{name}.jsonl" for name in ("train", "valid", "test")},
        folder=tmp_path,
        steps=30,
        learning_rate=2e-3,
        serving=False,
    )
    scores = preferences.tune_and_score(task, lambda stage: None)
    assert scores.reward_accuracy >= 0.9
    assert min(scores.supervised, scores.preferred) > 0  # the base alone answers none of these


def shortened(spec_of):
    return lambda data, examples: spec_of(data, examples).model_copy(update={"steps": 4, "eval_every": 4})
