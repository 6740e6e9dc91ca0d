"""A base that trains in milliseconds, examples for it, and the reference_loss's loss over them."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loramill.data.tokenizer import EncodedExample, TokenSpan
from loramill.jobs.train import loop
from loramill.jobs.train.loop import TrainingProgress
from loramill.types import JobSpec

from ...llama import tiny_llama

NOWHERE = Path("/nowhere")


def tiny(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    # By this seed it gets worse at what it doesn't train on after some steps, not from the first.
    return tiny_llama(dtype, seed=2, vocab_size=64, tie_word_embeddings=True).requires_grad_(False)


def spec_of(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {"base": "f" * 64, "adapter": "acme/support", "train": "file-1", "rank": 4, "alpha": 8.0}
    fields |= {"steps": 6, "batch_size": 5, "checkpoint_every": 2, "learning_rate": 1e-2, "keep": "last"}
    return JobSpec(**fields | changes)


def random_examples(count: int, seed: int = 0, *, weighed: bool = False) -> list[EncodedExample]:
    """Random examples with a common beginning; weighed, many have two answers of different weights."""
    draw = random.Random(seed)
    examples = []
    for line in range(1, count + 1):
        tokens = [1, 2, 3, *draw.choices(range(60), k=draw.randint(1, 9))]
        earlier = []
        if weighed and draw.random() < 0.6:
            begin = len(tokens)
            tokens += draw.choices(range(60), k=draw.randint(1, 5))
            earlier.append(TokenSpan(begin, len(tokens), draw.choice([0.25, 1.0, 3.0])))
            tokens += draw.choices(range(60), k=draw.randint(1, 5))
        prompt = len(tokens)
        tokens += draw.choices(range(60), k=draw.randint(1, 7))
        weight = draw.choice([0.5, 1.0, 2.0]) if weighed else 1.0
        examples.append(EncodedExample(tuple(tokens), prompt, weight, tuple(earlier), line))
    return examples


def train(model: PreTrainedModel, *arguments: Any, **more: Any) -> Generator[TrainingProgress, None, None]:
    """`training.train` of a base whose files its method doesn't read."""
    return loop.train(model, *arguments, **{"folder": NOWHERE} | more)


def adapter(model: PreTrainedModel, spec: JobSpec, place: Path | str, **more: Any) -> dict[str, bytes]:
    """The files of the job, from its last checkpoint on."""
    for _ in train(
        model, more.pop("train", random_examples(23)), more.pop("valid", []), spec, checkpoints=place, **more
    ):
        pass
    return loop.export_adapter(place, spec, base="tiny")


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def reference_loss(model: Any, examples: Sequence[EncodedExample]) -> tuple[torch.Tensor, float]:
    """Weighted mean cross-entropy and accuracy of padded examples, by transformers' own mask and positions."""
    width = max(len(example.tokens) for example in examples)
    tokens, mask = torch.zeros(len(examples), width, dtype=torch.long), torch.zeros(len(examples), width)
    weights = torch.zeros(len(examples), width)
    for line, example in enumerate(examples):
        tokens[line, : len(example.tokens)] = torch.tensor(example.tokens)
        mask[line, : len(example.tokens)] = 1
        for span in example.spans:
            weights[line, span.start : span.stop] = span.weight
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].flatten(0, 1).float()
    labels, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = cross_entropy(logits, labels, reduction="none")
    right = ((logits.argmax(-1) == labels) * weights).sum() / weights.sum()
    return (losses * weights).sum() / weights.sum(), right.item()
