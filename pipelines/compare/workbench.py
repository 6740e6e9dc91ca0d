"""What all subjects share: the examples and their order, the training loop, and the measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from loramill.jobs.train.context import TrainingProgress
from loramill.models.catalog import load_for_training
from loramill.pipelines.compare import memory
from loramill.pipelines.compare.answers import Answerer, quality, token_seconds
from loramill.pipelines.compare.data import TaskData
from loramill.pipelines.compare.types import MemoryUse, Report, Serving, Task, TaskProgress, Training
from loramill.pipelines.nightly.text_metrics import Score
from loramill.settings import ServeSettings
from loramill.sizing.anatomy import anatomy, read_config


@dataclass(frozen=True, slots=True)
class Workbench:
    """A task, its data, and a function that gets the task's progress."""

    task: Task
    data: TaskData
    report: Report

    @property
    def checkpoints(self) -> Path:
        """The folder for the training loop's checkpoints."""
        return self.task.folder / "checkpoints"

    @property
    def engine(self) -> ServeSettings:
        """The settings of the engine."""
        return ServeSettings(threads=self.task.threads, device=self.task.device)

    def load(self) -> PreTrainedModel:
        """Loads the base for training: on a GPU, a quantized base stays quantized."""
        return load_for_training(self.data.base, torch.bfloat16, device=self.task.device, cache=self.task.cache)

    def quality(self, answerer: Answerer) -> Score:
        """Scores the answers to the test questions."""

        def report(done: int) -> None:
            self.report(TaskProgress(name="answering", done=done, total=len(self.data.test)))

        return quality(answerer, self.data.test, self.data.tokenizer, report)

    def serving(self, by: Literal["engine", "transformers"], **answerers: Answerer) -> Serving | None:
        """The seconds per token of `base`, `unmerged` and `merged`; None if the task does not measure serving."""
        if not self.task.serving:
            return None
        self.report(TaskProgress(name="timing tokens"))
        return Serving(backend=by, **token_seconds(answerers, self.data.test[0], self.task.device))


def run_training(bench: Workbench, progress: Iterable[TrainingProgress], *, base: int) -> Training:
    """Trains to the end, and measures memory and time; the caller sets `parameters` and `artifact_bytes`.

    The median time per step excludes steps with a validation and the first step, which warms up, if there are others.

    Args:
        base: bytes in use with the base loaded.
    """
    device = bench.task.device
    clock = time.perf_counter if device == "cuda" else time.process_time
    memory.reset_peak(device)
    seconds, plain, losses = [], [], []
    begun = clock()
    for point in progress:
        seconds.append(clock() - begun)
        if point.valid_loss is None:
            plain.append(seconds[-1])
        else:
            losses.append(point.valid_loss)
        bench.report(TaskProgress(name="training", done=point.step, total=point.total_steps))
        begun = clock()
    return Training(
        parameters=0,
        base_parameters=anatomy(read_config(str(bench.data.base.folder))).parameters,
        learning_rate=bench.data.spec.learning_rate,
        steps=len(seconds),
        batch_size=bench.data.spec.batch_size,
        # Pages that `base` still counted may have been returned to the system since.
        memory=MemoryUse(base=base, peak=max(base, memory.peak_bytes(device))),
        step_seconds=statistics.median(plain[1:] or plain or seconds),
        valid_loss=min(losses, default=None),
        artifact_bytes=0,
    )
