"""GPUs: which processes see them, those of this machine, and how engines and training share them."""

from __future__ import annotations

import math

#: Environment of every process on Ray. Without it a process that requests no GPU sees all GPUs of its node, and torch,
#: transformers, bitsandbytes and DeepSpeed use any GPU that they see (Ray 2.60, `ray._private.utils`).
ONLY_ASSIGNED_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}

#: Environment of the processes that use a GPU. Each pass of a training job and each prompt has tensors of new sizes;
#: without expandable segments, memory that was freed in other sizes stays unusable until the process ends.
GPU_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

#: Memory of a CUDA context with its libraries, which torch's allocator does not count.
CONTEXT_BYTES = 700 * 2**20

#: The lowest supported compute capability: older GPUs do not compute in bfloat16.
MIN_CAPABILITY = (8, 0)
#: The lowest compute capability with matrix products in float8 (`torch._scaled_mm`): Ada, Hopper and Blackwell.
FP8_CAPABILITY = (8, 9)
#: Why an engine on a CPU can't serve a base in float8.
FP8_ON_CPU = (
    'serve.quantization = "fp8" needs a GPU, and the engine runs on the CPU: unset it. quantization = "int8" or "nf4" '
    "also stores a base in fewer bits, but not a mixture of experts."
)


def ray_share(share: float) -> float:
    """A share of a GPU, rounded down to the steps of 1/10,000 in which Ray counts: rounded up, fewer would fit."""
    return math.floor(round(share * 10_000, 6)) / 10_000


def capability_problem(name: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU can't be used, as a sentence; None if it can be."""
    if capability >= MIN_CAPABILITY:
        return None
    have, need = (f"{major}.{minor}" for major, minor in (capability, MIN_CAPABILITY))
    return (
        f"{name} has compute capability {have}, and loramill needs {need} (Ampere) or newer: "
        "older GPUs do not compute in bfloat16."
    )


def fp8_problem(name: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU can't serve a base in float8, as a sentence; None if it can."""
    if capability >= FP8_CAPABILITY:
        return None
    have, need = (f"{major}.{minor}" for major, minor in (capability, FP8_CAPABILITY))
    return (
        f'serve.quantization = "fp8" needs a GPU of compute capability {need} (Ada, Hopper) or newer, and {name} has '
        f'{have}: unset it. quantization = "int8" or "nf4" also stores a base in fewer bits, but not a mixture of '
        "experts."
    )


def memory_fraction(share: float, total_bytes: int) -> float:
    """The fraction of a GPU's memory that torch's allocator may use in a process with this share of the GPU.

    Each process has a CUDA context besides: without subtracting it, the processes would together use more than there
    is.
    """
    return max(0.01, share - CONTEXT_BYTES / total_bytes)
