"""Training's numbers for the tools that people look at them with: TensorBoard, Weights & Biases, MLflow.

    with opened(settings.loggers, run=job.id, spec=spec, folder=logs) as tell:
        for point in train(...):
            tell(point)

The record keeps the same numbers in any case. A tool that fails on the way is left out with a line in the log: no job
is lost because a dashboard is away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from loramill.errors import SetupError
from loramill.jobs.train.loop import TrainingProgress
from loramill.types import JobSpec

log = logging.getLogger(__name__)

LoggerName = Literal["tensorboard", "wandb", "mlflow"]

#: The project or experiment that the runs of all jobs are in.
PROJECT = "loramill"


class Logger(Protocol):
    """One tool's run of one job."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the figures of a step."""

    def close(self) -> None:
        """Ends the run; everything is stored."""


@contextmanager
def open_loggers(
    names: Sequence[LoggerName], *, run: str, spec: JobSpec, folder: Path
) -> Iterator[Callable[[TrainingProgress], None]]:
    """A function that takes every point of a training to the tools of these names.

    Args:
        run: the job's id; another attempt of the job goes on with the same run.
        folder: where TensorBoard's runs are.

    Raises:
        SetupError: a tool isn't installed; the message names loramill's extra.
    """
    loggers: dict[LoggerName, Logger] = {}

    def tell(point: TrainingProgress) -> None:
        rest = {
            "learning_rate": point.learning_rate,
            "grad_norm": point.grad_norm,
            "trained_tokens": point.trained_tokens,
        }
        figures = {figure: value for figure, value in (point.metrics | rest).items() if figure != "step"}
        for name, logger in list(loggers.items()):
            with _dropped_on_error(name, loggers):
                logger.log(point.step, figures)

    try:
        for name in names:
            loggers[name] = _OPEN[name](run, spec, folder)
        yield tell
    finally:
        for name, logger in list(loggers.items()):
            with _dropped_on_error(name, loggers):
                logger.close()


@contextmanager
def _dropped_on_error(name: LoggerName, loggers: dict[LoggerName, Logger]) -> Iterator[None]:
    try:
        yield
    except Exception:  # theirs are of any kind
        log.exception("%s takes no more figures of this job", name)
        del loggers[name]


class _TensorBoard:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder / run))
        self._writer.add_text("spec", f"```json\n{spec.model_dump_json(indent=1)}\n```")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            self._writer.add_scalar(figure, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("wandb"):
            import wandb
        config = spec.model_dump(mode="json")
        self._run: Any = wandb.init(
            project=PROJECT, id=run, name=f"{spec.adapter} {run}", resume="allow", config=config
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: str, spec: JobSpec, folder: Path) -> None:
        with _requires("mlflow"):
            from mlflow import MlflowClient
        self._client: Any = MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        where = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        begun = self._client.search_runs([where], f"tags.job = '{run}'", max_results=1)
        tags = {"job": run, "mlflow.runName": f"{spec.adapter} {run}"}
        self._id = (begun[0] if begun else self._client.create_run(where, tags=tags)).info.run_id
        if not begun:
            for name, value in spec.model_dump(mode="json").items():
                self._client.log_param(self._id, name, value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_OPEN: dict[LoggerName, Callable[[str, JobSpec, Path], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


@contextmanager
def _requires(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SetupError(
            f"The setting jobs.loggers names {name}, which isn't installed here: pip install 'loramill[{name}]', "
            "or take it out of the setting."
        ) from error
