"""Full fine-tuning: DeepSpeed trains every weight of a base, norms and embeddings included.

The version is a LoRA of the spec's rank, the one nearest to what training changed, so that it is served in the same
batches as all others. The full weights are a second result: a base model by themselves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.deepspeed import zero_optimizer
from loramill.jobs.train.export.adapter import load_checkpoint_to_export
from loramill.jobs.train.export.extract_lora import ExtractionReport, extract_lora
from loramill.jobs.train.export.hf import save_hf_model
from loramill.jobs.train.export.merge import merge_into
from loramill.jobs.train.loop import train
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.models.catalog import Base, load_for_training
from loramill.types import JobSpec

#: File of the adapter that says how much of the training it holds.
REPORT_FILE = "extraction.json"


@dataclass(frozen=True, slots=True)
class FullFinetuneResult:
    """The results of a full fine-tune.

    Attributes:
        adapter_files: the extracted LoRA in PEFT's files, and the report, by name.
        model_files: paths of the files of a Hugging Face folder, by name: the model in bfloat16, with the base's
            tokenizer.
        report: how much of the change the LoRA holds.
    """

    adapter_files: dict[str, bytes]
    model_files: dict[str, Path]
    report: ExtractionReport


def train_full(base: Base, context: TrainContext, *, device: torch.device) -> Generator[TrainingProgress, None, None]:
    """Trains all weights of a base, as `loramill.jobs.train.loop.train` trains an adapter.

    Training starts from the values that the base is served with, computes in bfloat16, and keeps float32 weights.

    Args:
        base: loaded here, for this job alone.
        context: its `start_from` is merged into the base's weights first; its process group is that of an initialized
            `torch.distributed`.
        device: where the model computes; the spec's `offload` says what is kept on the host.

    Raises:
        SetupError: DeepSpeed can't build its CPU optimizer.
        LoramillError: as `train`.
    """
    model = load_for_training(base, torch.bfloat16).requires_grad_(True)
    if context.start_from is not None:
        model = merge_into(model, context.start_from).requires_grad_(True)

    @contextmanager
    def attach(model: PreTrainedModel, spec: JobSpec, folder: Path) -> Iterator[AdaptedModel]:
        with zero_optimizer(model, spec, device, context.process_group) as optimizer:
            yield AdaptedModel(
                model=optimizer.model, weights=optimizer.weights, set_dropout=lambda on: None, optimizer=optimizer
            )

    yield from train(model, replace(context, start_from=None, attach=attach))


def export_full(checkpoints: Path | str, spec: JobSpec, *, base: Base, folder: Path) -> FullFinetuneResult:
    """Exports the job's result, with the weights that `spec.keep` names.

    Args:
        folder: an empty folder, where the full weights are written.

    Raises:
        ArtifactMissing: the checkpoints do not reach the end of the job.
        ArtifactCorrupt: a checkpoint can't be read.
        InvalidRequest: the base lacks a target.
    """
    weights = load_checkpoint_to_export(checkpoints, spec).weights
    model = load_for_training(base, torch.bfloat16)
    files, report = extract_lora(model, weights, spec, base.name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    save_hf_model(model, base.folder, folder)
    return FullFinetuneResult(
        adapter_files={**files, REPORT_FILE: report.model_dump_json(indent=1).encode()},
        model_files={file.name: file for file in sorted(folder.iterdir())},
        report=report,
    )
