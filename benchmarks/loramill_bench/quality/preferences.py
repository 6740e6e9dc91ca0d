"""Quality after DPO on pairs of a tenant's answers, which are chosen, and the base's, which are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loramill.data.encoding import TrainingExample, encode_all
from loramill.data.examples import Example, read_examples
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.loop import train
from loramill.models.catalog import load_for_training
from loramill.names import AdapterName
from loramill.pipelines.compare.answers import EngineAnswerer, answer_limits, quality
from loramill.pipelines.compare.data import TaskData, read_task
from loramill.pipelines.compare.measure import write_files
from loramill.pipelines.compare.types import Task
from loramill.serve.offline import OfflineEngine
from loramill.settings import ServeSettings
from loramill.submission.defaults import resolve_spec
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.types import JobSpec


@dataclass(frozen=True, slots=True)
class PreferenceScores:
    """Quality before and after DPO.

    Attributes:
        reward_accuracy: share of the held-out pairs whose chosen answer has the higher reward, at the published step.
        supervised, preferred: exact match on the test questions after supervised training, and after DPO from there.
    """

    reward_accuracy: float
    supervised: float
    preferred: float


def tune_and_score(task: Task, report: Callable[[str], object]) -> PreferenceScores:
    """Trains an adapter, continues it with DPO, both with default options, and scores both.

    The pairs are made from the questions of the training and the validation file; those of the validation file are held
    out. A question that the base answers as the tenant does, or not at all, gives no pair.

    Args:
        task: its subject is "lora"; its data are chats without tools.
        report: called with the progress from time to time.
    """
    torch.set_num_threads(task.threads)
    data = read_task(task)
    files = [read_examples(path.read_bytes(), path.name) for path in (task.train, task.valid)]
    report("the base's answers")
    with _engine(task, data) as engine:
        train_pairs, valid_pairs = (_pairs(EngineAnswerer(engine), data, file.examples) for file in files)
    model = load_for_training(data.base, torch.bfloat16, cache=task.cache)
    supervised, preferred = task.folder / "supervised", task.folder / "preferred"
    context = TrainContext(
        spec=data.spec,
        train_examples=data.train,
        valid_examples=data.valid,
        base_folder=data.base.folder,
        checkpoints=task.folder / "supervised-checkpoints",
    )
    _train(model, context, data, supervised, report)
    context = TrainContext(
        spec=_dpo_spec(data, len(train_pairs)),
        train_examples=train_pairs,
        valid_examples=valid_pairs,
        base_folder=data.base.folder,
        checkpoints=task.folder / "preferred-checkpoints",
        start_from=supervised,
    )
    best = _train(model, context, data, preferred, report)
    del model
    with _engine(task, data) as engine:
        before, after = (
            quality(EngineAnswerer(engine, str(folder)), data.test, data.tokenizer, lambda done: None).exact_match
            for folder in (supervised, preferred)
        )
    return PreferenceScores(best.rewards["valid_rewards/accuracies"], before, after)


def _engine(task: Task, data: TaskData) -> OfflineEngine:
    return OfflineEngine(data.base, Path, ServeSettings(threads=task.threads, device=task.device), cache=task.cache)


def _pairs(base: EngineAnswerer, data: TaskData, examples: Sequence[Example]) -> list[TrainingExample]:
    """Pairs of the tenant's and the base's answers, written in OpenAI's format, and read and encoded as by a job."""
    answers = base.answer(examples, answer_limits(examples, data.tokenizer), lambda done: None)
    rows = (
        {
            "input": {"messages": example.messages[:-1]},
            "preferred_output": [{"role": "assistant", "content": example.completion}],
            "non_preferred_output": [{"role": "assistant", "content": answer}],
        }
        for example, answer in zip(examples, answers, strict=True)
        if answer.strip() not in ("", example.completion.strip())
    )
    pairs = read_examples(_jsonl(rows), "pairs.jsonl").examples
    return encode_all(data.tokenizer, pairs, data.spec.train_on)


def _jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _dpo_spec(data: TaskData, examples: int) -> JobSpec:
    options = LoramillOptions(objective="dpo", start_from="champion")
    request = JobRequest(AdapterName("bench", "preferred"), "train.jsonl", "valid.jsonl", options=options)
    return resolve_spec(request, data.base, examples, start_from="champion", continued=data.spec)


def _train(
    model: PreTrainedModel, context: TrainContext, data: TaskData, folder: Path, report: Callable[[str], object]
) -> TrainingProgress:
    """Trains, and exports the best adapter to a folder; returns the progress at its step."""
    best = None
    for progress in train(model, context):
        best = progress if progress.is_best else best
        if progress.valid_loss is not None:
            report(f"{folder.name}, step {progress.step} of {progress.total_steps}")
    assert best is not None
    write_files(export_adapter(context.checkpoints, context.spec, base=data.base.name), folder)
    return best
