"""Measures one task in this process: trains, answers the test questions, times the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from loramill.jobs.train.context import TrainContext
from loramill.jobs.train.export.adapter import export_adapter, load_checkpoint_to_export
from loramill.jobs.train.export.hf import save_hf_model
from loramill.jobs.train.export.merge import merge_into
from loramill.jobs.train.full_finetune import export_full, train_full
from loramill.jobs.train.loop import train
from loramill.jobs.train.methods import AdaptedModel, attach_adapter
from loramill.models.catalog import Base, load_for_training
from loramill.pipelines.compare import memory
from loramill.pipelines.compare.answers import EngineAnswerer, TransformersAnswerer
from loramill.pipelines.compare.data import read_task
from loramill.pipelines.compare.methods import bottleneck, prefix
from loramill.pipelines.compare.methods.transformers import MakeCache, empty_cache
from loramill.pipelines.compare.types import ComparisonRow, Report, Task, TaskProgress, Training
from loramill.pipelines.compare.workbench import Workbench, run_training
from loramill.serve.offline import OfflineEngine
from loramill.types import JobSpec

#: Inner units of a bottleneck adapter, and tokens of a prefix, per rank of LoRA: bottleneck adapters then have about as
#: many parameters as LoRA at all linears.
UNITS, TOKENS = 4, 2

#: A note on QLoRA's memory on a CPU.
DENSE_NOTE = "on a CPU it trains on a dense base; four bits save memory in serving, and in training on a GPU."

Attach = Callable[[PreTrainedModel, JobSpec, Path], AbstractContextManager[AdaptedModel]]


def measure_task(task: Task, report: Report) -> ComparisonRow:
    """Measures a task.

    Raises:
        LoramillError: the task failed.
    """
    torch.set_num_threads(task.threads)
    report(TaskProgress(name="reading"))
    bench = Workbench(task, read_task(task), report)
    match task.subject:
        case "base":
            return _untuned(bench)
        case "full":
            return _full(bench)
        case "prefix":
            return _transformers_only(bench, _prefix(bench), _prefix_cache)
        case "bottleneck":
            return _transformers_only(bench, _bottleneck, lambda adapted: empty_cache)
        case _:
            return _adapter(bench)


def _untuned(bench: Workbench) -> ComparisonRow:
    """Measures the base itself."""
    with OfflineEngine(bench.data.base, Path, bench.engine, cache=bench.task.cache) as engine:
        base = EngineAnswerer(engine)
        return ComparisonRow(subject="base", quality=bench.quality(base), serving=bench.serving("engine", base=base))


def _adapter(bench: Workbench) -> ComparisonRow:
    """Measures a method whose result is a LoRA or DoRA, which the engine serves."""
    training = _train(bench, bench.load(), attach_adapter)
    folder = write_files(
        export_adapter(bench.checkpoints, bench.data.spec, base=bench.data.base.name), bench.task.folder / "adapter"
    )
    with OfflineEngine(bench.data.base, Path, bench.engine, cache=bench.task.cache) as engine:
        adapted = EngineAnswerer(engine, str(folder))
        row = ComparisonRow(
            subject=bench.task.subject,
            training=_with_artifact(training, folder),
            quality=bench.quality(adapted),
            notes=(DENSE_NOTE,) if bench.data.base.quantization == "nf4" and bench.task.device == "cpu" else (),
        )
        if not bench.task.serving:
            return row
        with OfflineEngine(_merge(bench, folder), Path, bench.engine) as other:
            timed = bench.serving("engine", base=EngineAnswerer(engine), unmerged=adapted, merged=EngineAnswerer(other))
    return row.model_copy(update={"serving": timed})


def _full(bench: Workbench) -> ComparisonRow:
    """Measures full fine-tuning, whose result is a base of its own."""
    task, data = bench.task, bench.data
    model = bench.load()
    base = memory.used_bytes(task.device)
    del model  # the trainer loads one itself
    progress = train_full(data.base, _train_context(bench), device=torch.device(task.device))
    training = run_training(bench, progress, base=base)
    folder = task.folder / "whole"
    folder.mkdir()
    result = export_full(bench.checkpoints, data.spec, base=data.base, folder=folder)
    with OfflineEngine(replace(data.base, folder=folder, fingerprint=""), Path, bench.engine) as engine:
        adapted = EngineAnswerer(engine)
        row = ComparisonRow(
            subject="full",
            training=_with_artifact(training.model_copy(update={"parameters": training.base_parameters}), folder),
            quality=bench.quality(adapted),
            notes=(f"a LoRA of rank {data.spec.rank} would keep {result.report.energy_of_all:.0%} of the change.",),
        )
        if not task.serving:
            return row
        with OfflineEngine(data.base, Path, bench.engine) as other:
            return row.model_copy(
                update={"serving": bench.serving("engine", base=EngineAnswerer(other), merged=adapted)}
            )


def _transformers_only(bench: Workbench, attach: Attach, cache: Callable[[AdaptedModel], MakeCache]) -> ComparisonRow:
    """Measures a method that the engine does not serve, by transformers; `cache` makes the cache of its answers."""
    model = bench.load()
    training = _train(bench, model, attach)
    weights = _trained_weights(bench)
    folder = write_files({"adapter.safetensors": save(weights)}, bench.task.folder / "adapter")
    with attach(model, bench.data.spec, bench.data.base.folder) as adapted:
        with torch.no_grad():
            for name, weight in adapted.weights.items():
                weight.copy_(weights[name])
        after = TransformersAnswerer(model, bench.data.tokenizer, cache(adapted))
        return ComparisonRow(
            subject=bench.task.subject,
            training=_with_artifact(training, folder),
            quality=bench.quality(after),
            serving=bench.serving(
                "transformers", base=TransformersAnswerer(bench.load(), bench.data.tokenizer), unmerged=after
            ),
        )


def _bottleneck(model: PreTrainedModel, spec: JobSpec, folder: Path) -> AbstractContextManager[AdaptedModel]:
    return bottleneck.attach_bottleneck(model, UNITS * spec.rank, spec.seed)


def _prefix(bench: Workbench) -> Attach:
    begin = [token for example in bench.data.train for token in example.tokens][: TOKENS * bench.data.spec.rank]
    return lambda model, spec, folder: prefix.attach_prefix(model, begin)


def _prefix_cache(adapted: AdaptedModel) -> MakeCache:
    assert isinstance(adapted.model, prefix.PrefixModel)
    return adapted.model.cache


def _train(bench: Workbench, model: PreTrainedModel, attach: Attach) -> Training:
    """Trains with the loop of jobs, which writes the weights to its checkpoints."""
    progress = train(model, _train_context(bench, attach))
    training = run_training(bench, progress, base=memory.used_bytes(bench.task.device))
    return training.model_copy(
        update={"parameters": sum(weight.numel() for weight in _trained_weights(bench).values())}
    )


def _train_context(bench: Workbench, attach: Attach = attach_adapter) -> TrainContext:
    return TrainContext(
        spec=bench.data.spec,
        train_examples=bench.data.train,
        valid_examples=bench.data.valid,
        base_folder=bench.data.base.folder,
        checkpoints=bench.checkpoints,
        attach=attach,
    )


def _trained_weights(bench: Workbench) -> dict[str, torch.Tensor]:
    """The weights after training."""
    return load_checkpoint_to_export(bench.checkpoints, bench.data.spec).weights


def _merge(bench: Workbench, adapter: Path) -> Base:
    """The base that the adapter was trained on, with the adapter merged into it; in bfloat16."""
    base, folder = bench.data.base, bench.task.folder / "merged"
    folder.mkdir()
    save_hf_model(merge_into(load_for_training(base, torch.bfloat16), adapter), base.folder, folder)
    return replace(base, folder=folder, fingerprint="", quantization="none")


def write_files(files: Mapping[str, bytes], folder: Path) -> Path:
    """Writes files, by name, into a folder that does not exist yet; returns the folder."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _with_artifact(training: Training, folder: Path) -> Training:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return training.model_copy(update={"artifact_bytes": size})
