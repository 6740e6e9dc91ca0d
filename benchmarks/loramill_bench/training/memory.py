"""The error of sizing's memory estimates: each case trains for two steps in a new process.

On a CPU, the process's peak resident memory (VmHWM) is compared with the whole estimate; on a GPU,
torch.cuda.max_memory_allocated with the estimate without the framework's own memory.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loramill.data.encoding import EncodedExample
from loramill.errors import SetupError
from loramill.gpus.process import open_gpu
from loramill.models.catalog import find_base, load_for_training
from loramill.models.smollm2 import NAME
from loramill.settings import Settings
from loramill.sizing import anatomy, read_config
from loramill.sizing.memory import MemoryEstimate, estimate
from loramill.sizing.passes import Device, largest_row
from loramill.types import TARGETS, JobSpec, Method, Quantization
from loramill_bench.kernels import Result

#: Maximum errors relative to the measured memory; on a GPU, the second applies to estimates that are too low.
CPU_ERROR, GPU_ERROR, GPU_UNDERESTIMATE = 0.10, 0.05, 0.03

_STEPS, _EXAMPLES = 2, 16


@dataclass(frozen=True, slots=True)
class Case:
    """A job on the built-in base: examples of `length` tokens, of which the fraction `supervised` is supervised."""

    name: str
    method: Method = "lora"
    quantization: Quantization = "none"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rank: int = 16
    targets: tuple[str, ...] = TARGETS
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    length: int = 128
    supervised: float = 0.5
    batch_size: int = 8
    micro_tokens: int = 256
    gradient_checkpointing: bool = False
    packing: bool = True

    def spec(self, base: str) -> JobSpec:
        """The spec of the job."""
        not_job_options = {"name", "quantization", "dtype", "length", "supervised"}
        options = {name: value for name, value in asdict(self).items() if name not in not_job_options}
        return JobSpec(
            base=base,
            adapter="bench/memory",
            train="bench",
            steps=_STEPS,
            checkpoint_every=1,
            max_length=8192,
            **options,
        )


CASES = (
    Case("defaults"),
    Case("rank 4, q and v", rank=4, targets=("q_proj", "v_proj")),
    Case("rank 128", rank=128),
    Case("a third of the layers", layers=tuple(range(20, 30))),
    Case("128 tokens per pass", micro_tokens=128),
    Case("1024 tokens per pass", micro_tokens=1024),
    Case("2048 tokens per pass", micro_tokens=2048, batch_size=16),
    Case("2048 tokens, recomputed", micro_tokens=2048, batch_size=16, gradient_checkpointing=True),
    Case("an example of 1024 tokens", length=1024, batch_size=2, micro_tokens=1024, supervised=0.25),
    Case("all tokens supervised", micro_tokens=512, supervised=1.0),
    Case("padded rows of 32", packing=False, length=32, batch_size=32),
    Case("dropout", dropout=0.1),
    Case("float32", dtype="float32"),
    Case("int8", quantization="int8"),
    Case("nf4", quantization="nf4", rank=64),
    Case("DoRA", method="dora"),
    Case("AdaLoRA", method="adalora"),
    Case("PiSSA", method="pissa"),
)


def results(report: Callable[[str], object], cases: Sequence[Case] = CASES) -> list[Result]:
    """The relative error of each case's estimate, on the GPU if there is one; `report` is called with each case's name.

    Raises:
        SetupError: A case couldn't be measured.
    """
    found = []
    for case in cases:
        report(f"memory, {case.name}")
        device, measured = measure_peak(case)
        prediction = predict(case, device)
        predicted_bytes = prediction.bytes if device == "cpu" else prediction.tensors
        error = predicted_bytes / measured - 1
        limit = CPU_ERROR if device == "cpu" else GPU_UNDERESTIMATE if error < 0 else GPU_ERROR
        found.append(
            Result(
                f"memory, {case.name}: {predicted_bytes / 1e6:.0f} of {measured / 1e6:.0f} MB",
                abs(error),
                "relative error",
                limit,
            )
        )
    return found


def predict(case: Case, device: Device) -> MemoryEstimate:
    """Sizing's estimate for a case."""
    base = find_base(NAME, Settings.load().cache, case.quantization)
    spec = case.spec(base.fingerprint)
    return estimate(
        spec,
        anatomy(read_config(str(base.folder))),
        case.quantization,
        largest_row(spec, [case.length] * _EXAMPLES, case.supervised, shared_prefixes=False),
        device,
        4 if case.dtype == "float32" else 2,
    )


def measure_peak(case: Case) -> tuple[Device, int]:
    """Trains a case in a new process; returns the device and its peak memory in bytes.

    Raises:
        SetupError: The process failed.
    """
    command = [sys.executable, "-m", "loramill_bench.training.memory", json.dumps(asdict(case))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SetupError(f"The case '{case.name}' couldn't be measured: {ran.stderr.strip().rpartition(chr(10))[2]}")
    device, peak = ran.stdout.split()[-2:]
    return ("cuda" if device == "cuda" else "cpu"), int(peak)


def train_case(case: Case) -> str:
    """Trains a case in this process; returns the device and its peak memory in bytes, as text."""
    import torch

    from loramill.jobs.train.context import TrainContext
    from loramill.jobs.train.loop import train

    torch.set_num_threads(1)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        open_gpu(1.0)
    base = find_base(NAME, Settings.load().cache, case.quantization)
    model = load_for_training(base, getattr(torch, case.dtype), device=device)
    draw = random.Random(0)
    examples = [
        EncodedExample(
            tokens=random_tokens(draw, case.length),
            prompt_length=round(case.length * (1 - case.supervised)),
        )
        for _ in range(_EXAMPLES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        context = TrainContext(
            spec=case.spec(base.fingerprint),
            train_examples=examples,
            base_folder=base.folder,
            checkpoints=Path(folder),
        )
        for _ in train(model, context):
            pass
    return f"{device} {torch.cuda.max_memory_allocated() if device == 'cuda' else resident_peak()}"


def resident_peak() -> int:
    """The process's peak of resident memory in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def random_tokens(draw: random.Random, length: int) -> tuple[int, ...]:
    """Random tokens of the built-in base."""
    return tuple(draw.randrange(3, 40000) for _ in range(length))


def parse_case(values: dict[str, Any]) -> Case:
    """The case of a JSON object."""
    tuples = {name: None if values[name] is None else tuple(values[name]) for name in ("targets", "layers")}
    return Case(**values | tuples)


if __name__ == "__main__":
    sys.stdout.write(train_case(parse_case(json.loads(sys.argv[1]))) + "\n")
