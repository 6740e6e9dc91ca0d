"""The stage training: a QLoRA job on Llama-3-8B, its speed and its memory."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramill.data.encoding import EncodedExample
from loramill.sizing.anatomy import Anatomy, anatomy
from loramill.sizing.memory import estimate
from loramill.sizing.passes import largest_row
from loramill.types import JobSpec
from loramill_bench.gpu import model as performance
from loramill_bench.gpu.bases import has_bitsandbytes, llama, random_trainable
from loramill_bench.gpu.stage import Context
from loramill_bench.results import Result


@dataclass(frozen=True, slots=True)
class Case:
    """A job whose steps have one pass of `examples` examples of `length` tokens."""

    examples: int
    length: int
    recompute: bool = True
    supervised: float = 0.5
    steps: int = 4

    @property
    def name(self) -> str:
        """The case's name in results."""
        return f"gpu train {self.examples}x{self.length}{'' if self.recompute else ' without recomputation'}"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.examples * self.length

    @property
    def spec(self) -> JobSpec:
        """The job's spec."""
        return JobSpec(
            base="0" * 64,
            adapter="bench/gpu",
            train="bench",
            steps=self.steps,
            batch_size=self.examples,
            max_length=16384,
            micro_tokens=self.tokens,
            gradient_checkpointing=self.recompute,
            checkpoint_every=1000,
            keep="last",
        )


_CASES = (Case(4, 512), Case(8, 512), Case(1, 2048), Case(4, 512, recompute=False))
_DRY_CASES = (Case(2, 16), Case(2, 16, recompute=False))
_LONG = Case(1, 12288, supervised=1.0, steps=2)


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a job reported: seconds and loss of each step."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def measure(context: Context) -> Iterator[Result]:
    """Tokens per second, losses, and the peak of memory compared with sizing."""
    shapes = llama(context)
    begun = time.monotonic()
    packed = not context.dry and has_bitsandbytes()
    base = random_trainable(context, shapes, packed=packed)
    context.note(f"{'NF4' if packed else 'bfloat16'} base in {time.monotonic() - begun:.1f} s")
    for case in context.choose(_CASES, _DRY_CASES):
        yield from _measure_case(context, base, anatomy(shapes), case, packed)
    yield _recomputation(context, base)
    if not context.dry:
        peak = context.peak_bytes(lambda: _train(context, base, _LONG, _Trained()))
        yield Result("gpu train 12,288 supervised tokens: peak", peak / 2**30, "GiB")


def _measure_case(context: Context, base: Any, shapes: Anatomy, case: Case, packed: bool) -> Iterator[Result]:
    trained = _Trained()
    peak = context.peak_bytes(lambda: _train(context, base, case, trained))
    seconds = statistics.median(trained.seconds[1:])
    yield Result(f"{case.name}: tokens per second", case.tokens / seconds, "tokens/s")
    not_finite = sum(not math.isfinite(loss) for loss in trained.losses)
    yield Result(f"{case.name}: losses that are not finite", not_finite, "losses")
    context.note(f"{case.name}: losses {trained.losses}, seconds {[round(each, 3) for each in trained.seconds]}")
    if context.dry:
        return
    parts = performance.training_seconds(shapes, performance.Pass(case.tokens, case.length, case.recompute, packed))
    context.note(f"{case.name}: {seconds:.3f} s, modeled on an H100 {parts.total:.3f} s: {parts}")
    row = largest_row(case.spec, [case.length], case.supervised, shared_prefixes=False)
    sized = estimate(case.spec, shapes, "nf4" if packed else "none", row, "cuda").tensors
    yield Result(f"{case.name}: peak", peak / 1e9, "GB")
    yield Result(f"{case.name}: sizing too low", max(0.0, 1 - sized / peak), "of the peak")
    yield Result(f"{case.name}: sizing too high", max(0.0, sized / peak - 1), "of the peak")


def _recomputation(context: Context, base: Any) -> Result:
    """Whether a job has the same losses, bit for bit, whether it recomputes its activations or not."""
    length = context.choose(256, 16)
    losses = []
    for recompute in (True, False):
        trained = _Trained()
        _train(context, base, Case(2, length, recompute, steps=3), trained, deterministic=True)
        losses.append(trained.losses)
    differing = sum(one != other for one, other in zip(*losses, strict=True))
    return Result("gpu train: difference by recomputation", differing, "losses")


def _train(context: Context, base: Any, case: Case, trained: _Trained, deterministic: bool = False) -> None:
    from loramill.jobs.train.context import TrainContext
    from loramill.jobs.train.loop import train

    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as folder:
        job = TrainContext(
            spec=case.spec,
            train_examples=_examples(base.config.vocab_size, case),
            base_folder=Path(folder),
            checkpoints=Path(folder),
            deterministic=deterministic,
        )
        with closing(train(base, job)) as steps:
            for _ in range(case.steps):
                begun = time.perf_counter()
                trained.losses.append(next(steps).loss)
                context.synchronize()
                trained.seconds.append(time.perf_counter() - begun)


def _examples(vocabulary: int, case: Case) -> list[EncodedExample]:
    draw = random.Random(0)
    prompt = round(case.length * (1 - case.supervised))
    return [
        EncodedExample(tuple(draw.randrange(3, vocabulary) for _ in range(case.length)), prompt)
        for _ in range(2 * case.examples)
    ]
