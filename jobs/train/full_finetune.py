"""Fine-tuning of every weight of a base, by DeepSpeed: norms and embeddings, too.

The version that comes of it is the LoRA nearest to what training changed, of the spec's rank, so that it is served in
the same batches as everybody's; the whole weights are a second result, a base of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loramill.data.tokenizer import EncodedExample
from loramill.jobs.train.deepspeed import zero_optimizer
from loramill.jobs.train.extract_lora import ExtractionReport, extract_lora
from loramill.jobs.train.hf_export import save_hf_model
from loramill.jobs.train.loop import (
    SINGLE_PROCESS,
    ProcessGroup,
    TrainingProgress,
    load_checkpoint_to_export,
    no_check,
    train,
)
from loramill.jobs.train.merge import merge_into
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.models.catalog import Base, load_for_training
from loramill.types import JobSpec

#: Where an adapter's files tell how much of the training it holds.
REPORT_FILE = "extraction.json"


@dataclass(frozen=True, slots=True)
class FullFinetuneResult:
    """What a full fine-tune leaves.

    Attributes:
        files: of the extracted LoRA, as PEFT has them, and the report.
        whole: the model in bfloat16 as a Hugging Face folder, with the base's tokenizer; by name, where they lie.
        report: how much of the change the LoRA holds.
    """

    adapter_files: dict[str, bytes]
    model_files: dict[str, Path]
    report: ExtractionReport


def train_full(
    base: Base,
    train_examples: Sequence[EncodedExample],
    valid: Sequence[EncodedExample],
    spec: JobSpec,
    *,
    device: torch.device,
    checkpoints: Path | str,
    start_from: Path | None = None,
    check: Callable[[], None] = no_check,
    micro_tokens: int | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Generator[TrainingProgress, None, None]:
    """Trains all weights as `spec` says; arguments and errors are those of `loramill.jobs.train.loop.train`.

    Training begins from the very values that the base is served with, computes in bfloat16, and keeps float32.

    Args:
        base: loaded here, for this job alone.
        device: where the model computes; what lies on the host besides is the spec's `offload`.
        start_from: a PEFT folder, which is merged into the base's weights first.
        processes: those of an initialized `torch.distributed`.

    Raises:
        SetupError: DeepSpeed can't build its CPU optimizer.
    """
    model = load_for_training(base, torch.bfloat16).requires_grad_(True)
    if start_from is not None:
        model = merge_into(model, start_from).requires_grad_(True)

    @contextmanager
    def attach(model: PreTrainedModel, spec: JobSpec, folder: Path) -> Iterator[AdaptedModel]:
        with zero_optimizer(model, spec, device, processes) as update:
            yield AdaptedModel(
                model=update.model, weights=update.weights, set_dropout=lambda on: None, optimizer=update
            )

    yield from train(
        model,
        train_examples,
        valid,
        spec,
        folder=base.folder,
        checkpoints=checkpoints,
        check=check,
        micro_tokens=micro_tokens,
        processes=processes,
        attach=attach,
    )


def export_full(checkpoints: Path | str, spec: JobSpec, *, base: Base, folder: Path) -> FullFinetuneResult:
    """The job's result, of the weights that `spec.keep` names.

    Args:
        folder: an empty one, where the whole weights are written.

    Raises:
        ArtifactMissing: the job is not at its end in `checkpoints`.
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
