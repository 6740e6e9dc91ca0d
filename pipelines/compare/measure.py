"""Measures one task in this process: trains, answers the test questions, times the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from loramill.jobs.train.full_finetune import export_full, train_full
from loramill.jobs.train.hf_export import write_whole
from loramill.jobs.train.loop import export, kept, train
from loramill.jobs.train.merge import merged
from loramill.jobs.train.methods import Tuned, attached
from loramill.models.catalog import Base, load_for_training
from loramill.pipelines.compare import memory
from loramill.pipelines.compare.answers import ByEngine, ByTransformers
from loramill.pipelines.compare.data import read
from loramill.pipelines.compare.methods import bottleneck, prefix
from loramill.pipelines.compare.methods.transformers import MakeCache, empty
from loramill.pipelines.compare.types import Report, Row, Stage, Task, Training
from loramill.pipelines.compare.workbench import Workbench, watched
from loramill.serve.offline import OfflineEngine
from loramill.types import JobSpec

#: Inner units of a bottleneck adapter, and tokens of a prefix, for each of LoRA's rank: the first then trains about as
#: many parameters as LoRA at all linears does.
UNITS, TOKENS = 4, 2

#: What there is to know of QLoRA's memory on a CPU.
DENSE = "while it trains on a CPU its base is kept dense; what four bits save shows where it is served, and on a GPU."

Attach = Callable[[PreTrainedModel, JobSpec, Path], AbstractContextManager[Tuned]]


def measure(task: Task, report: Report) -> Row:
    """The row of a task.

    Raises:
        LoramillError: it can't be done.
    """
    torch.set_num_threads(task.threads)
    report(Stage(name="reading"))
    bench = Workbench(task, read(task), report)
    match task.subject:
        case "base":
            return _untuned(bench)
        case "full":
            return _full(bench)
        case "prefix":
            return _beside(bench, _prefix(bench), _prefix_cache)
        case "bottleneck":
            return _beside(bench, _bottleneck, lambda tuned: empty)
        case _:
            return _adapter(bench)


def _untuned(bench: Workbench) -> Row:
    """The base as it is."""
    with OfflineEngine(bench.data.base, Path, bench.engine) as engine:
        base = ByEngine(engine)
        return Row(subject="base", quality=bench.quality(base), serving=bench.serving("engine", base=base))


def _adapter(bench: Workbench) -> Row:
    """What ends as a LoRA or DoRA, which the engine serves beside others."""
    training = _trained(bench, bench.load(), attached)
    folder = _written(
        export(bench.checkpoints, bench.data.spec, base=bench.data.base.name), bench.task.folder / "adapter"
    )
    with OfflineEngine(bench.data.base, Path, bench.engine) as engine:
        tuned = ByEngine(engine, str(folder))
        row = Row(
            subject=bench.task.subject,
            training=_with_artifact(training, folder),
            quality=bench.quality(tuned),
            notes=(DENSE,) if bench.data.base.quantization == "nf4" and bench.task.device == "cpu" else (),
        )
        if not bench.task.serving:
            return row
        with OfflineEngine(_merged(bench, folder), Path, bench.engine) as other:
            timed = bench.serving("engine", base=ByEngine(engine), unmerged=tuned, merged=ByEngine(other))
    return row.model_copy(update={"serving": timed})


def _full(bench: Workbench) -> Row:
    """What ends as a base of its own."""
    task, data = bench.task, bench.data
    model = bench.load()
    base = memory.held(task.device)
    del model  # the trainer loads its own
    progress = train_full(
        data.base,
        data.train,
        data.valid,
        data.spec,
        device=torch.device(task.device),
        checkpoints=bench.checkpoints,
    )
    training = watched(bench, progress, base=base)
    folder = task.folder / "whole"
    folder.mkdir()
    result = export_full(bench.checkpoints, data.spec, base=data.base, folder=folder)
    with OfflineEngine(replace(data.base, folder=folder, fingerprint=""), Path, bench.engine) as engine:
        tuned = ByEngine(engine)
        row = Row(
            subject="full",
            training=_with_artifact(training.model_copy(update={"parameters": training.of}), folder),
            quality=bench.quality(tuned),
            notes=(
                f"as a LoRA of rank {data.spec.rank} {result.report.energy_of_all:.0%} of the change would be kept.",
            ),
        )
        if not task.serving:
            return row
        with OfflineEngine(data.base, Path, bench.engine) as other:
            return row.model_copy(update={"serving": bench.serving("engine", base=ByEngine(other), merged=tuned)})


def _beside(bench: Workbench, attach: Attach, cache: Callable[[Tuned], MakeCache]) -> Row:
    """What the engine doesn't serve, by transformers; `cache` is what its answers begin with."""
    model = bench.load()
    training = _trained(bench, model, attach)
    weights = _kept(bench)
    folder = _written({"adapter.safetensors": save(weights)}, bench.task.folder / "adapter")
    with attach(model, bench.data.spec, bench.data.base.folder) as tuned:
        with torch.no_grad():
            for name, weight in tuned.weights.items():
                weight.copy_(weights[name])
        after = ByTransformers(model, bench.data.tokenizer, cache(tuned))
        return Row(
            subject=bench.task.subject,
            training=_with_artifact(training, folder),
            quality=bench.quality(after),
            serving=bench.serving(
                "transformers", base=ByTransformers(bench.load(), bench.data.tokenizer), unmerged=after
            ),
        )


def _bottleneck(model: PreTrainedModel, spec: JobSpec, folder: Path) -> AbstractContextManager[Tuned]:
    return bottleneck.attached(model, UNITS * spec.rank, spec.seed)


def _prefix(bench: Workbench) -> Attach:
    begin = [token for example in bench.data.train for token in example.tokens][: TOKENS * bench.data.spec.rank]
    return lambda model, spec, folder: prefix.attached(model, begin)


def _prefix_cache(tuned: Tuned) -> MakeCache:
    assert isinstance(tuned.model, prefix.Prefixed)
    return tuned.model.cache


def _trained(bench: Workbench, model: PreTrainedModel, attach: Attach) -> Training:
    """Trains by the loop of the jobs, which leaves the weights in its checkpoints."""
    progress = train(
        model,
        bench.data.train,
        bench.data.valid,
        bench.data.spec,
        folder=bench.data.base.folder,
        checkpoints=bench.checkpoints,
        attach=attach,
    )
    training = watched(bench, progress, base=memory.held(bench.task.device))
    return training.model_copy(update={"parameters": sum(weight.numel() for weight in _kept(bench).values())})


def _kept(bench: Workbench) -> dict[str, torch.Tensor]:
    """The weights that training came to."""
    return kept(bench.checkpoints, bench.data.spec).weights


def _merged(bench: Workbench, adapter: Path) -> Base:
    """The base with an adapter's deltas in its own weights, those it was trained on; in bfloat16."""
    base, folder = bench.data.base, bench.task.folder / "merged"
    folder.mkdir()
    write_whole(merged(load_for_training(base, torch.bfloat16), adapter), base.folder, folder)
    return replace(base, folder=folder, fingerprint="", quantization="none")


def _written(files: Mapping[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _with_artifact(training: Training, folder: Path) -> Training:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return training.model_copy(update={"artifact_bytes": size})
