"""A worker on the CPU, with the base in bfloat16."""

from __future__ import annotations

import torch

from loramill.data.tokenizer import ChatTokenizer
from loramill.jobs.worker.worker import Worker
from loramill.models.catalog import Base, load_for_training
from loramill.registry import Registry
from loramill.settings import Settings


def bench_worker(base: Base, registry: Registry, settings: Settings) -> Worker:
    """Returns a worker that has loaded the base."""
    model = load_for_training(base, torch.bfloat16)
    return Worker(
        name="bench:1",
        registry=registry,
        base=base,
        model=lambda: model,
        device=torch.device("cpu"),
        tokenizer=ChatTokenizer.load(base.folder),
        checkpoints=settings.checkpoints,
        logs=settings.home / "logs",
        settings=settings.jobs,
    )
