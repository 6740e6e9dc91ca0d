"""Quality of the answers of tenants whose adapters were trained together, by passes that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.engine import Driver, TrainingEngine, Work
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.forward import configured_forward
from loramill.jobs.train.loop import TrainingRun, open_run
from loramill.models.catalog import load_for_training
from loramill.pipelines.compare.answers import EngineAnswerer, quality
from loramill.pipelines.compare.data import TaskData, read_task
from loramill.pipelines.compare.measure import write_files
from loramill.pipelines.compare.types import Task
from loramill.pipelines.nightly.text_metrics import Score
from loramill.serve.offline import OfflineEngine
from loramill.settings import ServeSettings
from loramill.sizing.tenants import PASS_TOKENS


def train_and_score(tasks: Mapping[str, Task], report: Callable[[str], object]) -> dict[str, Score]:
    """Trains all tasks' adapters next to one base with default options, and scores each on its test questions.

    Args:
        tasks: by tenant, with the subject "lora" and the same base.
        report: called with the progress from time to time.
    """
    data = {tenant: read_task(task) for tenant, task in tasks.items()}
    first = next(iter(tasks.values()))
    torch.set_num_threads(first.threads)
    folders = {tenant: task.folder / "checkpoints" for tenant, task in tasks.items()}
    _train_together(data, folders, first.cache, report)
    scores = {}
    serve = ServeSettings(threads=first.threads, device=first.device)
    with OfflineEngine(next(iter(data.values())).base, Path, serve, cache=first.cache) as engine:
        for tenant, each in data.items():
            files = export_adapter(folders[tenant], each.spec, base=each.base.name)
            folder = write_files(files, tasks[tenant].folder / "adapter")
            answerer = EngineAnswerer(engine, str(folder))
            scores[tenant] = quality(answerer, each.test, each.tokenizer, lambda done: None)
    return scores


def _train_together(
    data: Mapping[str, TaskData], folders: Mapping[str, Path], cache: Path, report: Callable[[str], object]
) -> None:
    base, tokens = next(iter(data.values())).base, PASS_TOKENS["cpu"]
    model = load_for_training(base, torch.bfloat16, cache=cache)
    driver: Driver[None] = Driver(TrainingEngine(model), tokens)
    with configured_forward(model, tokens), ExitStack() as stack:
        for tenant, each in data.items():
            context = TrainContext(
                spec=each.spec,
                train_examples=each.train,
                valid_examples=each.valid,
                base_folder=base.folder,
                checkpoints=folders[tenant],
            )
            run = stack.enter_context(open_run(model, context))
            driver.start(tenant, tenant, _all_steps(tenant, run, report))
        while len(driver):
            for ended in driver.run_pass(1.0):
                if ended.error is not None:
                    raise ended.error


def _all_steps(tenant: str, run: TrainingRun, report: Callable[[str], object]) -> Work[None]:
    while not run.state.finished:
        progress: TrainingProgress = yield from run.advance()
        if progress.valid_loss is not None:
            report(f"together: {tenant}, step {progress.step} of {progress.total_steps}")
