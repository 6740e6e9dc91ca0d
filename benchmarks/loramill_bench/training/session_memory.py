"""The error of sizing's estimates for jobs that train in one session: each mix trains two steps in a new process.

As in `memory`, a CPU's figure is the process's peak of resident memory (VmHWM).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramill.data.encoding import EncodedExample
from loramill.errors import SetupError
from loramill.models.catalog import find_base, load_for_training
from loramill.models.smollm2 import NAME
from loramill.settings import Settings
from loramill.sizing import anatomy, read_config
from loramill.sizing.memory import MemoryEstimate
from loramill.sizing.passes import largest_row
from loramill.sizing.targets import trained_elements
from loramill.sizing.tenants import SessionJob, estimate_session
from loramill_bench.kernels import Result
from loramill_bench.training.memory import CPU_ERROR, Case, parse_case, random_tokens, resident_peak

_EXAMPLES = 16


@dataclass(frozen=True, slots=True)
class Mix:
    """Jobs of one session, with the quantization and dtype of the first one."""

    name: str
    jobs: tuple[Case, ...]

    @property
    def pass_tokens(self) -> int:
        """Maximum tokens of a pass with several jobs."""
        return max(job.micro_tokens for job in self.jobs)


def _ranked(ranks: Sequence[int], **options: Any) -> tuple[Case, ...]:
    return tuple(Case(f"rank {rank}", rank=rank, **options) for rank in ranks)


_SHORT: dict[str, Any] = {"length": 64, "batch_size": 1, "micro_tokens": 512}

MIXES = (
    Mix("8 jobs of one example of 64 tokens", _ranked([8] * 8, **_SHORT)),
    Mix(
        "ranks 4 to 64, 16 to 256 tokens",
        tuple(
            Case(f"rank {rank}", rank=rank, length=length, batch_size=1, micro_tokens=1024)
            for rank, length in zip((4, 8, 8, 16, 16, 32, 64, 64), (16, 32, 64, 96, 128, 160, 192, 256), strict=True)
        ),
    ),
    Mix(
        "targets q and v, all, and a third of the layers",
        (
            *_ranked([4, 8], targets=("q_proj", "v_proj"), **_SHORT),
            *_ranked([64, 64], **_SHORT),
            *_ranked([32, 32], layers=tuple(range(20, 30)), **_SHORT),
        ),
    ),
    Mix(
        "LoRA, DoRA, AdaLoRA and PiSSA",
        tuple(Case(method, method=method, **_SHORT) for method in ("lora", "dora", "adalora", "pissa")),
    ),
    Mix("6 jobs that accumulate gradients", _ranked([16] * 6, batch_size=16, micro_tokens=256)),
    Mix(
        "4 jobs that accumulate gradients in shared passes",
        (
            *_ranked([32] * 3, length=64, batch_size=16, micro_tokens=256),
            Case("rank 8", rank=8, length=64, batch_size=1, micro_tokens=1024),
        ),
    ),
    Mix("24 jobs", _ranked([16] * 24, length=32, batch_size=1, micro_tokens=256)),
    Mix(
        "2048 tokens, recomputed",
        _ranked([16] * 4, length=512, batch_size=1, micro_tokens=2048, gradient_checkpointing=True),
    ),
    Mix("float32", _ranked([8, 16, 32], dtype="float32", **_SHORT)),
    Mix("nf4", _ranked([64] * 4, quantization="nf4", **_SHORT)),
    Mix(
        "dropout, padded rows",
        _ranked([16] * 4, dropout=0.1, packing=False, length=32, batch_size=8, micro_tokens=1024),
    ),
)


def results(report: Callable[[str], object], mixes: Sequence[Mix] = MIXES) -> list[Result]:
    """The relative error of each mix's estimate on a CPU; `report` is called with each mix's name.

    Raises:
        SetupError: A mix couldn't be measured.
    """
    found = []
    for mix in mixes:
        report(f"session memory, {mix.name}")
        measured, predicted = measure_peak(mix), predict(mix).bytes
        name = f"session memory, {mix.name}: {predicted / 1e6:.0f} of {measured / 1e6:.0f} MB"
        found.append(Result(name, abs(predicted / measured - 1), "relative error", CPU_ERROR))
    return found


def predict(mix: Mix) -> MemoryEstimate:
    """Sizing's estimate for a mix on a CPU."""
    first = mix.jobs[0]
    base = find_base(NAME, Settings.load().cache, first.quantization)
    shape = anatomy(read_config(str(base.folder)))
    jobs = []
    for case in mix.jobs:
        spec = case.spec(base.fingerprint)
        row = largest_row(spec, [case.length] * _EXAMPLES, case.supervised, shared_prefixes=False)
        jobs.append(SessionJob(spec, trained_elements(spec, shape), row))
    dtype_bytes = 4 if first.dtype == "float32" else 2
    return estimate_session(jobs, shape, first.quantization, "cpu", dtype_bytes, pass_tokens=mix.pass_tokens)


def measure_peak(mix: Mix) -> int:
    """Trains a mix in a new process on the CPU; returns its peak memory in bytes.

    Raises:
        SetupError: The process failed.
    """
    command = [sys.executable, "-m", "loramill_bench.training.session_memory", json.dumps(asdict(mix))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SetupError(f"The mix '{mix.name}' couldn't be measured: {ran.stderr.strip().rpartition(chr(10))[2]}")
    return int(ran.stdout.split()[-1])


def train_mix(mix: Mix) -> int:
    """Trains a mix in this process; returns its peak memory in bytes."""
    import torch

    from loramill.jobs.train.context import TrainContext
    from loramill.jobs.train.engine import TrainingEngine
    from loramill.jobs.train.engine.driver import Driver
    from loramill.jobs.train.forward import configured_forward
    from loramill.jobs.train.loop import TrainingRun

    torch.set_num_threads(1)
    first, draw = mix.jobs[0], random.Random(0)
    base = find_base(NAME, Settings.load().cache, first.quantization)
    model = load_for_training(base, getattr(torch, first.dtype), device="cpu")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = []
        for number, case in enumerate(mix.jobs):
            context = TrainContext(
                spec=case.spec(base.fingerprint),
                train_examples=[
                    EncodedExample(random_tokens(draw, case.length), round(case.length * (1 - case.supervised)))
                    for _ in range(_EXAMPLES)
                ],
                base_folder=base.folder,
                checkpoints=Path(folder, str(number)),
            )
            adapted = stack.enter_context(context.attach(model, context.spec, base.folder))
            runs.append(TrainingRun(model, adapted, context))
        stack.enter_context(configured_forward(model, max(case.length for case in mix.jobs) + mix.pass_tokens))
        driver: Driver[None] = Driver(TrainingEngine(model), mix.pass_tokens)
        for number, run in enumerate(runs):
            run.resume()
            driver.start(str(number), str(number), _all_steps(run))
        while len(driver):
            for ended in driver.run_pass(1.0):
                if ended.error is not None:
                    raise ended.error
    return resident_peak()


def _all_steps(run: Any) -> Generator[Any, Any, None]:
    while not run.state.finished:
        yield from run.advance()


def _parse_mix(text: str) -> Mix:
    values = json.loads(text)
    return Mix(values["name"], tuple(parse_case(each) for each in values["jobs"]))


if __name__ == "__main__":
    sys.stdout.write(f"{train_mix(_parse_mix(sys.argv[1]))}\n")
