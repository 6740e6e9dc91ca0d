"""`loramill compare`: each subject is measured on a tiny base, in this process and in its own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.pipelines.compare import answers, memory, run, worker_process
from loramill.pipelines.compare.measure import measure_task
from loramill.pipelines.compare.types import ComparisonOptions, Subject, Task, TaskProgress
from loramill.settings import Settings

#: Parameters of the tiny base, and of what is trained on it at rank 4: 2 layers of width 32, keys of width 16, MLP 48.
TINY = 49152 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
LORA = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
PARAMETERS = {
    "lora": LORA,
    "qlora": LORA,
    "bottleneck": 2 * 2 * (32 * 16 + 16 + 16 * 32 + 32),
    "prefix": 8 * 2 * 2 * 16,
    "full": TINY,
}


@pytest.fixture
def task(tiny: Path, examples: Path, tmp_path: Path):
    def make(subject: Subject, **options) -> Task:
        values = {
            "subject": subject,
            "base": str(tiny),
            "cache": tmp_path / "cache",
            "train": examples / "train.jsonl",
            "valid": examples / "valid.jsonl",
            "test": examples / "test.jsonl",
            "folder": tmp_path / subject,
            "steps": 2,
            "batch_size": 4,
            "rank": 4,
        }
        made = Task.model_validate(values | options)
        made.folder.mkdir(parents=True, exist_ok=True)
        return made

    return make


def ignored(stage: TaskProgress) -> None:
    """Ignores progress."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are timed once, briefly."""
    monkeypatch.setattr(answers, "TIMED_TOKENS", 2)
    monkeypatch.setattr(answers, "ROUNDS", 1)


@pytest.mark.parametrize("subject", ["lora", "qlora", "adalora", "full", "bottleneck", "prefix"])
def test_a_row_has_the_cost_and_the_result_of_a_method(subject: Subject, task, quick: None) -> None:
    stages: list[TaskProgress] = []
    row = measure_task(task(subject), stages.append)
    assert row.subject == subject
    assert row.error is None
    training, serving = row.training, row.serving
    assert training is not None and serving is not None and row.quality is not None
    assert training.base_parameters == TINY
    assert training.parameters == PARAMETERS.get(subject, training.parameters)
    assert training.steps == 2
    assert training.memory.peak >= training.memory.base > 0
    assert training.step_seconds > 0
    assert training.valid_loss is not None and 5 < training.valid_loss < 20  # of a random base: about ln 49152
    assert training.artifact_bytes > (2 if subject == "full" else 4) * PARAMETERS.get(subject, 0)
    assert row.quality.examples == 4
    assert serving.backend == ("transformers" if subject in ("bottleneck", "prefix") else "engine")
    assert (serving.merged is None) == (serving.backend == "transformers")
    assert {stage.name for stage in stages} == {"reading", "training", "answering", "timing tokens"}
    assert TaskProgress(name="training", done=2, total=2) in stages


def test_the_base_is_measured_without_training(task, quick: None) -> None:
    row = measure_task(task("base"), ignored)
    assert row.training is None
    assert row.quality is not None and row.quality.examples == 4
    assert row.serving is not None and row.serving.unmerged is None and row.serving.merged is None


@pytest.mark.parametrize("subject", ["bottleneck", "prefix"])
def test_own_methods_reduce_the_loss(subject: Subject, task) -> None:
    """After a few steps at a high rate the validation loss is well below that after one step."""

    def loss(steps: int) -> float:
        folder = task(subject).folder / str(steps)
        row = measure_task(task(subject, steps=steps, learning_rate=0.1, serving=False, folder=folder), ignored)
        assert row.training is not None and row.training.valid_loss is not None
        return row.training.valid_loss

    assert loss(20) < loss(1) - 0.5


@pytest.mark.parametrize("subject", ["bottleneck", "prefix"])
def test_the_same_seed_gives_the_same_weights(subject: Subject, task) -> None:
    def weights(name: str, seed: int) -> bytes:
        folder = task(subject).folder / name
        measure_task(task(subject, folder=folder, seed=seed, serving=False), ignored)
        return (folder / "adapter" / "adapter.safetensors").read_bytes()

    assert weights("one", 1) == weights("again", 1) != weights("other", 2)


def test_a_task_runs_in_its_own_process(task) -> None:
    stages: list[TaskProgress] = []
    row = run.run_task(task("bottleneck", serving=False), stages.append)
    assert row.error is None and row.training is not None
    assert not task("bottleneck").folder.joinpath("checkpoints").exists()
    assert stages[-1] == TaskProgress(name="answering", done=4, total=4)


def test_an_error_is_a_row(task, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    row = worker_process.row_of(task("lora", train=bad), ignored)
    assert row.training is None
    assert row.error is not None and "bad.jsonl, line 1" in row.error


def test_only_a_task_on_a_gpu_opens_it(task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(worker_process, "open_gpu", shares.append)
    monkeypatch.setattr(worker_process, "measure_task", lambda task, report: task.device)
    rows = [worker_process.row_of(task("lora", device=device), ignored) for device in ("cpu", "cuda")]
    assert rows == ["cpu", "cuda"] and shares == [1.0]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch):
    """Replaces a task's process by a script."""

    def stand_in(script: str) -> None:
        monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", script))

    return stand_in


def test_a_crash_is_a_row_with_its_traceback(task, child) -> None:
    child("import sys; sys.stderr.write('Of old\\n'); raise ZeroDivisionError('of a test')")
    row = run.run_task(task("lora"))
    assert row.error == "The process ended with code 1: ZeroDivisionError: of a test"
    assert row.log.startswith("Of old\nTraceback")


def test_a_process_without_output_is_a_row(task, child) -> None:
    child("raise SystemExit(3)")
    assert run.run_task(task("lora")).error == "The process ended with code 3: no output"


STAGE = 'import sys, time; print(\'{"name": "training"}\', flush=True); '


def test_a_killed_process_is_a_row(task, child) -> None:
    """As the kernel does when memory runs out."""
    child(STAGE + "import os; os.kill(os.getpid(), 9)")
    stages: list[TaskProgress] = []
    row = run.run_task(task("lora"), stages.append)
    assert stages == [TaskProgress(name="training")]
    assert row.error is not None and "memory ran out" in row.error


def test_closing_the_reader_kills_the_process_group(task, child, tmp_path: Path) -> None:
    child(
        "import subprocess, sys; from pathlib import Path\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(other.pid))\n" + STAGE + "time.sleep(60)"
    )

    def interrupt(stage: TaskProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_task(task("lora"), interrupt)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    deadline = time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_memory_counts_allocations_and_releases() -> None:
    memory.reset_peak("cpu")
    before = memory.used_bytes("cpu")
    block = bytearray(os.urandom(1 << 20) * 64)
    assert before + (60 << 20) < memory.used_bytes("cpu")
    del block
    assert before + (60 << 20) < memory.peak_bytes("cpu") < before + (200 << 20)
    assert memory.used_bytes("cpu") < before + (30 << 20)
    memory.reset_peak("cpu")
    assert memory.peak_bytes("cpu") < before + (30 << 20)


def plan(tiny: Path, examples: Path, tmp_path: Path, **options) -> list[Task]:
    files = {name: examples / f"{name}.jsonl" for name in ("train", "valid", "test")}
    values = {"methods": ["lora", "prefix"], "base": str(tiny), "rank": 4, "seed": 3}
    chosen = ComparisonOptions(**(values | files | options))
    return run.plan_tasks(Settings(cache=tmp_path), tmp_path, chosen)


def test_a_plan_begins_with_the_base_and_keeps_the_order(tiny: Path, examples: Path, tmp_path: Path) -> None:
    tasks = plan(tiny, examples, tmp_path, methods=["prefix", " lora", "prefix"], rates=["lora=5e-4"], steps=7)
    assert [task.subject for task in tasks] == ["base", "prefix", "lora"]
    assert [task.learning_rate for task in tasks] == [None, None, 5e-4]
    assert {task.steps for task in tasks} == {7} and {task.seed for task in tasks} == {3}
    assert len({task.folder for task in tasks}) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["lora", "lorra"]}, InvalidRequest, "no method 'lorra'; the methods are full, lora"),
        ({"rates": ["lora"]}, InvalidRequest, "'lora' is not a method and its learning rate"),
        ({"rates": ["lora=fast"]}, InvalidRequest, "'lora=fast' is not a method"),
        ({"rates": ["lora=0"]}, InvalidRequest, "'lora=0' is not a method"),
        ({"rates": ["dora=1e-3"]}, InvalidRequest, "names 'dora', which --methods leaves out"),
        ({"batch_size": 5000}, InvalidRequest, "batch_size"),
        ({"base": "nowhere"}, Exception, "no base 'nowhere'"),
    ],
)
def test_a_plan_is_checked_before_anything_runs(
    options, error: type[Exception], message: str, tiny: Path, examples: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        plan(tiny, examples, tmp_path, **options)


def test_bad_data_are_refused_with_their_line(tiny: Path, examples: Path, tmp_path: Path) -> None:
    bad = tmp_path / "test.jsonl"
    bad.write_text((examples / "test.jsonl").read_text() + "{}\n")
    with pytest.raises(DatasetInvalid, match=r"test\.jsonl, line 5"):
        plan(tiny, examples, tmp_path, test=bad)


def test_methods_are_not_compared_on_preferences(tiny: Path, examples: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    with pytest.raises(DatasetInvalid, match=r"pairs\.jsonl holds preferences"):
        plan(tiny, examples, tmp_path, test=tmp_path / "pairs.jsonl")
