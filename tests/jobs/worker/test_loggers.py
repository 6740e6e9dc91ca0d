"""The metrics in TensorBoard's files, and those sent to the other tools."""

from __future__ import annotations

import importlib
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loramill.errors import SetupError
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.worker.loggers import open_loggers

from ..train.tiny_training import spec_of

POINTS = [
    TrainingProgress(1, 2, 2.5, 0.25, 1e-3, 3.0, 100),
    TrainingProgress(2, 2, 1.5, 0.5, 5e-4, 2.0, 210, valid_loss=1.75, valid_accuracy=0.4, is_best=True),
]


def log_points(names: list[Any], folder: Path) -> None:
    with open_loggers(names, run="ftjob-1", spec=spec_of(), folder=folder) as log:
        for point in POINTS:
            log(point)


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    log_points(["tensorboard"], tmp_path)
    read = EventAccumulator(str(tmp_path / "ftjob-1")).Reload()
    scalars = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert scalars["train_loss"] == [(1, 2.5), (2, 1.5)]
    assert scalars["valid_loss"] == [(2, 1.75)]
    assert scalars["learning_rate"] == [(1, pytest.approx(1e-3)), (2, pytest.approx(5e-4))]
    assert scalars["trained_tokens"] == [(1, 100), (2, 210)]
    assert {"grad_norm", "train_mean_token_accuracy", "valid_mean_token_accuracy"} <= scalars.keys()
    assert "spec/text_summary" in read.Tags()["tensors"]


@pytest.fixture(scope="module")
def trackio_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the configuration and the entries of a run in Trackio's database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))  # read once, when it is imported
        storage = importlib.import_module("trackio.sqlite_storage")
    return lambda run: (
        storage.SQLiteStorage.get_run_config("loramill", run),
        storage.SQLiteStorage.get_logs("loramill", run),
    )


@pytest.mark.filterwarnings("error")  # Trackio turns its errors into warnings
def test_trackio_gets_every_metric_without_a_network(
    tmp_path: Path, trackio_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    connections: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connections.append(address))
    log_points(["trackio"], tmp_path)
    log_points(["trackio"], tmp_path)  # another attempt of the job
    assert not connections
    config, entries = trackio_runs("ftjob-1")
    assert (config["rank"], config["_Group"]) == (4, spec_of().adapter)
    assert [(entry["step"], entry["train_loss"]) for entry in entries] == [(1, 2.5), (2, 1.5)] * 2
    assert entries[1]["valid_loss"] == 1.75 and entries[0]["learning_rate"] == 1e-3
    assert {"grad_norm", "trained_tokens", "train_mean_token_accuracy"} <= entries[0].keys()


@pytest.mark.filterwarnings("error")
def test_two_jobs_of_one_process_are_two_runs_in_trackio(tmp_path: Path, trackio_runs: Any) -> None:
    with ExitStack() as stack:
        logs = {
            run: stack.enter_context(open_loggers(["trackio"], run=run, spec=spec_of(), folder=tmp_path))
            for run in ("ftjob-2", "ftjob-3")
        }
        logs["ftjob-2"](POINTS[0])
        logs["ftjob-3"](POINTS[1])
        logs["ftjob-2"](POINTS[1])
    assert [entry["step"] for entry in trackio_runs("ftjob-2")[1]] == [1, 2]
    assert [entry["step"] for entry in trackio_runs("ftjob-3")[1]] == [2]


class Wandb(ModuleType):
    """Replaces wandb and records its calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run_config: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **config: Any) -> Wandb:
        self.run_config = config
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log_points(["wandb"], tmp_path)
    assert (wandb.run_config["id"], wandb.run_config["resume"], wandb.run_config["config"]["rank"]) == (
        "ftjob-1",
        "allow",
        4,
    )
    assert [step for step, _ in wandb.logged] == [1, 2]
    assert wandb.logged[1][1]["valid_loss"] == 1.75
    assert wandb.finished == 1


class Client:
    """Replaces mlflow's client; its server outlives it."""

    experiments: dict[str, str]
    runs: dict[str, dict[str, Any]]

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = "7"
        return "7"

    def search_runs(self, where: list[str], query: str, max_results: int) -> list[Any]:
        assert where == ["7"]
        found = [id_ for id_, run in self.runs.items() if query == f"tags.job = '{run['tags']['job']}'"]
        return [SimpleNamespace(info=SimpleNamespace(run_id=id_)) for id_ in found]

    def create_run(self, where: str, tags: dict[str, str]) -> Any:
        id_ = f"run-{len(self.runs)}"
        self.runs[id_] = {"tags": tags, "params": {}, "metrics": [], "ended": 0}
        return SimpleNamespace(info=SimpleNamespace(run_id=id_))

    def log_param(self, run: str, name: str, value: Any) -> None:
        self.runs[run]["params"][name] = value

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.runs[run]["metrics"].append((step, name, value))

    def set_terminated(self, run: str) -> None:
        self.runs[run]["ended"] += 1


def test_mlflow_gets_every_metric_in_one_run_per_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "experiments", {}, raising=False)
    monkeypatch.setattr(Client, "runs", {}, raising=False)
    module = ModuleType("mlflow")
    monkeypatch.setattr(module, "MlflowClient", Client, raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    log_points(["mlflow"], tmp_path)
    log_points(["mlflow"], tmp_path)  # another attempt of the job
    ((run, kept),) = Client.runs.items()
    assert (run, kept["tags"]["job"], kept["params"]["rank"], kept["ended"]) == ("run-0", "ftjob-1", 4, 2)
    assert (2, "valid_loss", 1.75) in kept["metrics"] and (1, "train_loss", 2.5) in kept["metrics"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=rf"names {name}.*pip install 'loramill\[{name}\]'"):
        log_points([name], tmp_path)


def test_a_failing_logger_is_dropped_and_the_job_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = Wandb()
    monkeypatch.setattr(wandb, "log", lambda *_, **__: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log_points(["wandb", "tensorboard"], tmp_path)
    assert caplog.text.count("wandb failed; this job") == 1
    assert EventAccumulator(str(tmp_path / "ftjob-1")).Reload().Scalars("train_loss")[1].value == 1.5


def test_a_logger_that_can_not_open_its_run_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = Wandb()
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log_points(["wandb", "tensorboard"], tmp_path)
    assert caplog.text.count("wandb failed; this job") == 1
    assert EventAccumulator(str(tmp_path / "ftjob-1")).Reload().Scalars("train_loss")[1].value == 1.5


def test_no_loggers_log_nothing(tmp_path: Path) -> None:
    log_points([], tmp_path)
    assert not list(tmp_path.iterdir())
