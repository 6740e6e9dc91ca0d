"""Trains by the jobs' methods as the training loop does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loramill.jobs.train.methods import adapter_files, attach_adapter
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.seeds import seed_of
from loramill.kernels.quantization import Quantization
from loramill.models.catalog import Base, load_for_training
from loramill.types import JobSpec

VOCABULARY = 64
CPU = torch.device("cpu")


def load_model(
    base: Base, quantization: Quantization = "none", dtype: torch.dtype = torch.float32, **more: Any
) -> PreTrainedModel:
    return copy.deepcopy(_read(replace(base, quantization=quantization), dtype, **more))


@lru_cache
def _read(base: Base, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    return load_for_training(base, dtype, **more)


def spec_of(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {"base": "f" * 64, "adapter": "acme/support", "train": "file-1", "rank": 4, "alpha": 6.0}
    return JobSpec(**fields | {"steps": 5, "batch_size": 2, "learning_rate": 1e-2} | changes)


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train_steps(adapted: AdaptedModel, spec: JobSpec, steps: int | None = None, begin: int = 0) -> None:
    """Takes steps as the training loop does."""
    groups = [
        {"params": [p], "lr": spec.learning_rate * adapted.lr_factors.get(n, 1.0)} for n, p in adapted.weights.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=spec.weight_decay, fused=True)
    for step in range(begin, spec.steps if steps is None else steps):
        adapted.set_dropout(seed_of(spec.seed, step))
        loss = loss_of(adapted.model, tokens(seed=step))
        penalty = adapted.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        adapted.after_step(step + 1)
        optimizer.zero_grad()
    adapted.set_dropout(None)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens(seed=99)).logits
    return logits.clone()


@contextmanager
def trained_model(model: PreTrainedModel, spec: JobSpec, folder: Path) -> Iterator[AdaptedModel]:
    """A model in training, at the job's end."""
    with attach_adapter(model, spec, folder) as adapted:
        train_steps(adapted, spec)
        yield adapted


def store_adapter(adapted: AdaptedModel, spec: JobSpec, folder: Path) -> Path:
    """The adapter's files."""
    folder.mkdir()
    for name, content in adapter_files(spec, adapted.weights, {**adapted.state, **adapted.derived()}, "small").items():
        (folder / name).write_bytes(content)
    return folder


def logits_by_peft(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(model, folder))
