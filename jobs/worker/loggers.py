"""Sends a job's metrics to TensorBoard, Trackio, Weights & Biases or MLflow.

    with open_loggers(settings.loggers, run=job.id, spec=spec, folder=logs) as log_progress:
        for progress in train(...):
            log_progress(progress)

The registry keeps the same metrics in any case. A tool that fails, also while its run is opened, is dropped with a
line in the log, and the job continues: no job is lost because a dashboard is away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from pathlib import Path
from typing import Any, Literal, Protocol

from loramill.errors import SetupError
from loramill.jobs.train.context import TrainingProgress
from loramill.types import JobSpec

log = logging.getLogger(__name__)

LoggerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]

#: Project or experiment of all runs.
PROJECT = "loramill"


class Logger(Protocol):
    """One tool's run of one job."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""

    def close(self) -> None:
        """Ends the run, with everything stored."""


@contextmanager
def open_loggers(
    names: Sequence[LoggerName], *, run: str, spec: JobSpec, folder: Path
) -> Iterator[Callable[[TrainingProgress], None]]:
    """Opens a run in each of these tools; yields a function that logs the progress of a step in all of them.

    Args:
        run: the job's id; another attempt of the job continues the same run.
        folder: folder of TensorBoard's runs.

    Raises:
        SetupError: a tool is not installed; the message names the extra of loramill to install.
    """
    loggers: dict[LoggerName, Logger] = {}

    def log_progress(progress: TrainingProgress) -> None:
        metrics = progress.metrics | {
            "learning_rate": progress.learning_rate,
            "grad_norm": progress.grad_norm,
            "trained_tokens": progress.trained_tokens,
        }
        del metrics["step"]
        for name, logger in list(loggers.items()):
            with _dropped_on_error(name, loggers):
                logger.log(progress.step, metrics)

    try:
        for name in names:
            with _dropped_on_error(name, loggers):
                loggers[name] = _OPEN[name](run, spec, folder)
        yield log_progress
    finally:
        for name, logger in list(loggers.items()):
            with _dropped_on_error(name, loggers):
                logger.close()


@contextmanager
def _dropped_on_error(name: LoggerName, loggers: dict[LoggerName, Logger]) -> Iterator[None]:
    try:
        yield
    except SetupError:  # the settings name a tool that is not installed
        raise
    except Exception:  # the tools raise errors of any kind
        log.exception("%s failed; this job is no longer logged there", name)
        loggers.pop(name, None)


class _TensorBoard:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder / run))
        self._writer.add_text("spec", f"```json\n{spec.model_dump_json(indent=1)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("trackio"):
            import trackio
        # Trackio continues a run by its name, so that the name is the job's ID. `init` ends the run that is current in
        # its context, which may be that of another job of this process: each run gets a context of its own.
        self._run: Any = Context().run(
            trackio.init,
            project=PROJECT,
            name=run,
            group=spec.adapter,
            config=spec.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("wandb"):
            import wandb
        config = spec.model_dump(mode="json")
        self._run: Any = wandb.init(
            project=PROJECT, id=run, name=f"{spec.adapter} {run}", resume="allow", config=config
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("mlflow"):
            from mlflow import MlflowClient
        self._client: Any = MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        existing = self._client.search_runs([experiment_id], f"tags.job = '{run}'", max_results=1)
        tags = {"job": run, "mlflow.runName": f"{spec.adapter} {run}"}
        self._id = (existing[0] if existing else self._client.create_run(experiment_id, tags=tags)).info.run_id
        if not existing:
            for name, value in spec.model_dump(mode="json").items():
                self._client.log_param(self._id, name, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_OPEN: dict[LoggerName, Callable[[str, JobSpec, Path], Logger]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


@contextmanager
def _requires(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SetupError(
            f"The setting jobs.loggers names {name}, which is not installed: pip install 'loramill[{name}]', "
            "or remove it from the setting."
        ) from error
