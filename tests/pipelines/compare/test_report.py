"""The output of a comparison: tables, chart, and the command."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramill.cli import app
from loramill.pipelines.compare import run
from loramill.pipelines.compare.format import duration, scaled, size
from loramill.pipelines.compare.report import chart, table
from loramill.pipelines.compare.types import (
    Comparison,
    ComparisonRow,
    MemoryUse,
    Serving,
    Subject,
    Task,
    TaskProgress,
    Training,
)
from loramill.pipelines.nightly.text_metrics import Score

ENGINE = Serving(backend="engine", base=0.010, unmerged=0.011, merged=0.010)
TRANSFORMERS = Serving(backend="transformers", base=0.040, unmerged=0.043)


def row(subject: Subject, parameters: int, exact: float, serving: Serving, **fields) -> ComparisonRow:
    training = Training(
        parameters=parameters,
        base_parameters=134_515_008,
        learning_rate=1e-3,
        steps=60,
        batch_size=8,
        memory=MemoryUse(base=600_000_000, peak=600_000_000 + 80 * parameters),
        step_seconds=1.5,
        valid_loss=0.204,
        artifact_bytes=4 * parameters,
    )
    return ComparisonRow(
        subject=subject, training=training, quality=Score(200, exact, 0.9, 0.8), serving=serving, **fields
    )


BASE = ComparisonRow(
    subject="base", quality=Score(200, 0.01, 0.02, 0.03), serving=Serving(backend="engine", base=0.010)
)
LORA = row("lora", 4_884_480, 0.925, ENGINE)
PREFIX = row("prefix", 368_640, 0.62, TRANSFORMERS, notes=("begins as a text.",))
FAILED = ComparisonRow(subject="dora", error="Memory ran out.", log="Traceback")


def comparison(*rows: ComparisonRow, **fields) -> Comparison:
    values = {"base": "smollm2-135m", "device": "cpu", "threads": 1, "seed": 0, "train": "a.jsonl", "test": "b.jsonl"}
    return Comparison.model_validate(values | fields | {"rows": rows})


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1k"), (1234, "1.23k"), (4_884_480, "4.88M"), (134_515_008, "135M"),
     (999_900_000, "1G"), (7.2e9, "7.2G")],
)  # fmt: skip
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert scaled(number) == text


def test_sizes_and_durations_have_units() -> None:
    assert [size(number) for number in (12, 19_594_231, 1_364_385_792)] == ["12 B", "19.6 MB", "1.36 GB"]
    assert [duration(seconds) for seconds in (1.523, 0.00936, 0.4)] == ["1.52 s", "9.36 ms", "400 ms"]


def test_the_tables_show_the_measurements() -> None:
    found = comparison(BASE, LORA, PREFIX, FAILED)
    assert table.training_rows(found) == [
        ("LoRA", "4.88M", "3.63%", "991 MB", "391 MB", "1.5 s", "0.001", "0.204", "19.5 MB"),
        ("Prefix tuning", "369k", "0.27%", "629 MB", "29.5 MB", "1.5 s", "0.001", "0.204", "1.47 MB"),
    ]
    assert table.result_rows(found) == [
        ("Base, untuned", "0.010", "0.020", "0.030", "10 ms", "-", "-", "engine"),
        ("LoRA", "0.925", "0.900", "0.800", "10 ms", "+1.00 ms (+10%)", "+0.00 ms (+0%)", "engine"),
        ("Prefix tuning", "0.620", "0.900", "0.800", "40 ms", "+3.00 ms (+7%)", "-", "transformers"),
    ]
    assert all(len(line) == len(table.TRAINING) for line in table.training_rows(found))
    assert all(len(line) == len(table.RESULT) for line in table.result_rows(found))
    assert table.failures(found) == ["DoRA failed: Memory ran out."]


def test_notes_explain_the_measurements() -> None:
    on_cpu = "\n".join(table.notes(comparison(BASE, LORA, PREFIX)))
    assert "resident bytes" in on_cpu and "CPU time" in on_cpu and "one of transformers" in on_cpu
    assert "Prefix tuning: begins as a text." in on_cpu
    on_gpu = "\n".join(table.notes(comparison(BASE, LORA, device="cuda", threads=2)))
    assert "on the GPU" in on_gpu and "2 threads" in on_gpu and "transformers" not in on_gpu


@pytest.mark.parametrize(("exact", "metric"), [(0.5, "exact_match"), (0.1, "exact_match"), (0.02, "rouge_l")])
def test_free_text_is_judged_by_rouge(exact: float, metric: str) -> None:
    assert comparison(BASE, row("lora", 1000, exact, ENGINE), FAILED).metric == metric


@pytest.mark.parametrize(
    "rows", [(LORA,), (BASE, LORA, PREFIX, FAILED), (LORA, LORA.model_copy(update={"subject": "qlora"}))]
)
def test_the_chart_names_every_point_once_per_panel(rows: tuple[ComparisonRow, ...], tmp_path: Path) -> None:
    figure = chart.build_figure(comparison(*rows))
    for axis in figure.axes:
        names = [text.get_text() for text in axis.texts]
        for each in rows:
            assert names.count(chart.NAMES.get(each.subject, each.title)) == (1 if each.training else 0)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [cost.title for cost in chart.COSTS]


def test_labels_of_close_points_do_not_overlap() -> None:
    close = [
        row(subject, 4_000_000 + 10_000 * number, 0.92 + 0.002 * number, ENGINE)
        for number, subject in enumerate(("full", "lora", "qlora", "dora", "adalora", "bottleneck"))
    ]
    figure = chart.build_figure(comparison(*close, PREFIX))
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
        assert len(boxes) == len(close) + 1
        assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


@pytest.mark.parametrize("other", [4_000_000, 368_640, 4_884_480 * 12])
def test_every_panel_has_numbers_on_its_axis(other: int) -> None:
    figure = chart.build_figure(comparison(BASE, LORA, row("dora", other, 0.9, ENGINE)))
    figure.draw_without_rendering()
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = axis.get_xticks()
        assert sum(low <= tick <= high for tick in ticks) >= 2, axis.get_title(loc="left")


def test_the_chart_is_a_png(tmp_path: Path) -> None:
    chart.save_chart(comparison(BASE, LORA, PREFIX), tmp_path / "chart.png")
    head = (tmp_path / "chart.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > 1500 and height > 600


@pytest.fixture
def invoke(tiny: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command with invented measurements; each call returns the result and the tasks."""
    monkeypatch.setenv("LORAMILL_CACHE", str(tmp_path / "cache"))

    def measured(task: Task, report) -> ComparisonRow:
        tasks.append(task)
        report(TaskProgress(name="training", done=1, total=2))
        return {"base": BASE, "lora": LORA, "prefix": PREFIX, "dora": FAILED}[task.subject]

    tasks: list[Task] = []
    monkeypatch.setattr(run, "run_task", measured)
    files = [
        argument for name in ("train", "valid", "test") for argument in (f"--{name}", str(examples / f"{name}.jsonl"))
    ]

    def invoked(*arguments: str):
        result = CliRunner().invoke(app, ["compare", *files, "--base", str(tiny), *arguments])
        return result, tasks

    return invoked


def test_the_command_shows_and_writes_the_results(invoke, tmp_path: Path) -> None:
    outputs = ("--json", str(tmp_path / "all.json"), "--chart", str(tmp_path / "all.png"))
    result, tasks = invoke("--methods", "lora,prefix", "--rank", "8", "--steps", "5", "--rate", "prefix=0.02", *outputs)
    assert result.exit_code == 0, result.output
    assert [task.subject for task in tasks] == ["base", "lora", "prefix"]
    assert {(task.rank, task.steps) for task in tasks} == {(8, 5)}
    assert [task.learning_rate for task in tasks] == [None, None, 0.02]
    for text in ("LoRA", "Prefix tuning", "4.88M", "+1.00 ms (+10%)", "Base, untuned"):
        assert text in result.stdout
    written = Comparison.model_validate(json.loads((tmp_path / "all.json").read_text()))
    assert [each.subject for each in written.rows] == ["base", "lora", "prefix"]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_method_changes_the_exit_code_alone(invoke, tmp_path: Path) -> None:
    result, _ = invoke("--methods", "dora,lora", "--json", str(tmp_path / "all.json"))
    assert result.exit_code == 1
    assert "DoRA failed: Memory ran out." in result.stderr
    assert "4.88M" in result.stdout
    assert json.loads((tmp_path / "all.json").read_text())["rows"][1]["error"] == "Memory ran out."


def test_there_is_no_chart_if_every_method_fails(invoke, tmp_path: Path) -> None:
    result, _ = invoke("--methods", "dora", "--chart", str(tmp_path / "all.png"))
    assert result.exit_code == 1
    assert not (tmp_path / "all.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "lorra"), "There is no method 'lorra'"),
        (("--rate", "lora"), "is not a method and its learning rate"),
        (("--json", "nowhere/all.json"), "nowhere/all.json can't be written"),
        (("--chart", "nowhere/all.png"), "nowhere/all.png can't be written"),
    ],
)
def test_invalid_options_are_refused_before_anything_runs(invoke, arguments: tuple[str, ...], message: str) -> None:
    result, tasks = invoke(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not tasks
