"""Steps of several jobs by shared passes, compared with the same steps one after another."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.engine import Driver, TrainingEngine
from loramill.jobs.train.forward import configured_forward
from loramill.jobs.train.loop import TrainingRun, open_run
from loramill.models.catalog import Base, load_for_training
from loramill.types import JobSpec, Quantization
from loramill_bench.results import Result
from loramill_bench.training.throughput import random_examples

#: Tokens of a shared pass, as in a session on a CPU.
_PASS_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Case:
    """Jobs that take a step each: the rank of each job, its examples per step and their tokens.

    Attributes:
        target: smallest ratio of the CPU times of separate and of shared steps.
    """

    name: str
    quantization: Quantization
    jobs: tuple[tuple[int, int, int], ...]
    target: float


CASES = (
    Case("shared 8x1x64", "none", ((8, 1, 64),) * 8, 1.4),
    Case("shared 8x1x64 nf4", "nf4", ((8, 1, 64),) * 8, 2.0),
    Case("shared 4x4x64", "none", ((8, 4, 64),) * 4, 1.15),
    Case(
        "shared mixed",
        "none",
        ((4, 1, 256), (8, 1, 16), (16, 1, 128), (64, 1, 32), (8, 1, 64), (32, 1, 16), (16, 1, 200), (4, 1, 96)),
        1.2,
    ),
)


def measure(base: Base, case: Case, rounds: int) -> list[Result]:
    """Alternates separate and shared steps of the same jobs in one process, on one thread, in CPU time.

    The first steps warm up. A job's losses must not depend on whether its step shares passes.
    """
    torch.set_num_threads(1)
    separate, shared = [], []
    with _open_runs(base, case) as (engine, runs):
        for _ in range(rounds + 1):
            begun = time.process_time()
            for run in runs:
                engine.complete(run.advance())
            separate.append(time.process_time() - begun)
            begun = time.process_time()
            _step_together(engine, runs)
            shared.append(time.process_time() - begun)
    ratio = statistics.median(alone / together for alone, together in zip(separate[1:], shared[1:], strict=True))
    tokens = sum(examples * length for _, examples, length in case.jobs)
    return [
        Result(f"{case.name}: separate steps over a shared one", ratio, "x", case.target, "higher"),
        Result(f"{case.name}: a shared step", tokens / statistics.median(shared[1:]), "tokens/s", better="higher"),
    ]


@contextmanager
def _open_runs(base: Base, case: Case) -> Iterator[tuple[TrainingEngine, list[TrainingRun]]]:
    model = load_for_training(replace(base, quantization=case.quantization), torch.bfloat16)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramill-bench-")))
        runs = []
        for number, (rank, examples, length) in enumerate(case.jobs):
            spec = JobSpec(
                base=base.fingerprint,
                adapter=f"bench/job{number}",
                train="bench",
                rank=rank,
                steps=1_000_000,
                batch_size=examples,
                seed=number,
                checkpoint_every=1_000_000,
                keep="last",
            )
            context = TrainContext(
                spec=spec,
                train_examples=random_examples([length] * 64),
                base_folder=base.folder,
                checkpoints=scratch / str(number),
            )
            runs.append(stack.enter_context(open_run(model, context)))
        stack.enter_context(configured_forward(model, _PASS_TOKENS))
        yield TrainingEngine(model), runs


def _step_together(engine: TrainingEngine, runs: Sequence[TrainingRun]) -> None:
    driver: Driver[TrainingProgress] = Driver(engine, _PASS_TOKENS)
    for number, run in enumerate(runs):
        driver.start(str(number), f"tenant{number}", run.advance())
    while len(driver):
        for ended in driver.run_pass(0.0):
            if ended.error is not None:
                raise ended.error
