"""Training throughput of a job, compared with PEFT and transformers' Trainer on the same batches."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from loramill.data.encoding import EncodedExample
from loramill.jobs.train.batching import choose_batch
from loramill.jobs.train.context import TrainContext
from loramill.jobs.train.loop import train
from loramill.models.catalog import Base, load_for_training
from loramill.types import JobSpec
from loramill_bench.results import Result
from loramill_bench.training.peft_trainer import PeftTrainer

_EXAMPLES = 64
_SHORTEST, _LONGEST = 16, 192
#: Maximum relative difference of a step's losses: both compute in bfloat16, which rounds to a 256th.
MAX_LOSS_DIFFERENCE = 0.01


def skewed_lengths() -> list[int]:
    """Lengths of examples, most of them short, as in most tenants' data; the mean is 60 tokens."""
    draw = random.Random(1)
    return [round(_SHORTEST + (_LONGEST - _SHORTEST) * draw.random() ** 3) for _ in range(_EXAMPLES)]


def equal_lengths() -> list[int]:
    """Equal lengths, so that padding costs nothing."""
    return [128] * _EXAMPLES


#: The lengths of the examples and the target of each group.
CASES: dict[str, tuple[Callable[[], list[int]], float]] = {
    "train skewed": (skewed_lengths, 1.8),
    "train equal": (equal_lengths, 1.25),
}


def measure(base: Base, case: str, rounds: int) -> list[Result]:
    """Alternates steps of both in one process, on one thread, in CPU time; the first steps warm up.

    LoRA of rank 16 at all linears, batches of 8, a base in bfloat16, AdamW. A third of each example's tokens is
    supervised, and the examples share no prefix (with a shared prefix, a job would gain more).
    """
    lengths, target = CASES[case]
    examples = random_examples(lengths())
    spec = JobSpec(
        base=base.fingerprint,
        adapter="bench/train",
        train="bench",
        steps=rounds + 1,
        batch_size=8,
        checkpoint_every=1_000_000,
        keep="last",
    )
    batches = [[examples[index] for index in choose_batch(len(examples), 8, step, 0)] for step in range(spec.steps)]
    tokens = [sum(len(example.tokens) for example in batch) for batch in batches]
    model = load_for_training(base, torch.bfloat16)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as scratch:
        context = TrainContext(spec=spec, train_examples=examples, base_folder=base.folder, checkpoints=Path(scratch))
        job = train(model, context)
        with closing(job), PeftTrainer(base, spec, batches, Path(scratch)) as trainer:
            ours, theirs, loss_differences = [], [], []
            for _ in batches:
                begun = time.process_time()  # of all threads, since Trainer has its own
                loss = next(job).loss
                ours.append(time.process_time() - begun)
                begun = time.process_time()
                loss_differences.append(abs(loss / trainer.step() - 1))
                theirs.append(time.process_time() - begun)
    rates = [
        [count / second for count, second in zip(tokens[1:], seconds[1:], strict=True)] for seconds in (ours, theirs)
    ]
    ratio = statistics.median(mine / other for mine, other in zip(*rates, strict=True))
    return [
        Result(f"{case}: a job over PEFT and Trainer", ratio, "x", target, "higher"),
        Result(f"{case}: a job", statistics.median(rates[0]), "tokens/s", better="higher"),
        Result(f"{case}: PEFT and Trainer", statistics.median(rates[1]), "tokens/s", better="higher"),
        Result(f"{case}: largest difference of losses", max(loss_differences), "of the loss", MAX_LOSS_DIFFERENCE),
    ]


def random_examples(lengths: Sequence[int]) -> list[EncodedExample]:
    """Random examples of these lengths; a third of each example's tokens is supervised."""
    draw = random.Random(0)
    return [
        EncodedExample(tuple(draw.choices(range(1000, 40_000), k=length)), length - max(4, length // 3))
        for length in lengths
    ]
