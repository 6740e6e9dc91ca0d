"""A base that trains in milliseconds, random examples for it, and a reference loss over them."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loramill.data.encoding import EncodedExample, EncodedPair, LabeledAnswer, TokenSpan, TrainingExample
from loramill.jobs.train import loop
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.export.adapter import export_adapter
from loramill.types import JobSpec

from ...llama import tiny_llama

NOWHERE = Path("/nowhere")


def tiny_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    # With this seed the loss on held-out examples rises after some steps, not from the first.
    return tiny_llama(dtype, seed=2, vocab_size=64, tie_word_embeddings=True).requires_grad_(False)


def spec_of(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {"base": "f" * 64, "adapter": "acme/support", "train": "file-1", "rank": 4, "alpha": 8.0}
    fields |= {"steps": 6, "batch_size": 5, "checkpoint_every": 2, "learning_rate": 1e-2, "keep": "last"}
    return JobSpec(**fields | changes)


def random_examples(count: int, seed: int = 0, *, weighed: bool = False) -> list[EncodedExample]:
    """Random examples with a common prefix; weighed, many have two answers of different weights."""
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


def random_pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """Random prompts, with a chosen answer that begins with one token and a rejected one that begins with another."""
    draw = random.Random(seed)
    pairs = []
    for line in range(1, count + 1):
        prompt = [1, 2, 3, *draw.choices(range(60), k=draw.randint(1, 9))]
        answers = [[first, *draw.choices(range(60), k=draw.randint(1, 6))] for first in (61, 62)]
        pairs.append(EncodedPair(*(EncodedExample((*prompt, *each), len(prompt), line=line) for each in answers)))
    return pairs


def random_judged(objective: str, count: int, seed: int = 0) -> list[TrainingExample]:
    """Random examples for an objective of preference tuning."""
    pairs = random_pairs(count, seed)
    if objective != "kto":
        return [*pairs]
    return [
        LabeledAnswer(pair.chosen if index % 2 else pair.rejected, bool(index % 2)) for index, pair in enumerate(pairs)
    ]


def train(
    model: PreTrainedModel,
    examples: Sequence[TrainingExample],
    valid: Sequence[TrainingExample],
    spec: JobSpec,
    **fields: Any,
) -> Generator[TrainingProgress, None, None]:
    return loop.train(model, context_of(examples, valid, spec, **fields))


def context_of(
    examples: Sequence[TrainingExample], valid: Sequence[TrainingExample], spec: JobSpec, **fields: Any
) -> TrainContext:
    """The context of a job whose method does not read the base's files."""
    return TrainContext(spec=spec, train_examples=examples, valid_examples=valid, **{"base_folder": NOWHERE} | fields)


def train_and_export(model: PreTrainedModel, spec: JobSpec, checkpoints: Path | str, **more: Any) -> dict[str, bytes]:
    """Trains the job from its last checkpoint to the end; returns the adapter's files."""
    for _ in train(
        model, more.pop("train", random_examples(23)), more.pop("valid", []), spec, checkpoints=checkpoints, **more
    ):
        pass
    return export_adapter(checkpoints, spec, base="tiny")


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def reference_loss(model: Any, examples: Sequence[EncodedExample]) -> tuple[torch.Tensor, float]:
    """Weighted mean cross-entropy and accuracy of padded examples, with transformers' own mask and positions."""
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
