"""The stage machine: what is installed, whether the GPU can be used, and the speed of its memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterator

import torch

from loramill.gpus.machine import gpu_problem, list_gpus, torch_cuda_version
from loramill.kernels.attention import varlen
from loramill.kernels.attention.varlen import VarlenBatch
from loramill_bench.gpu.stage import Context
from loramill_bench.results import Result

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "numpy", "safetensors", "pydantic")
_COPIED = 256 << 20


def measure(context: Context) -> Iterator[Result]:
    """Versions and problems; bytes per second to and within the device; the cost of a new length for attention."""
    context.note(" ".join([f"python {platform.python_version()}", *map(_version, _PACKAGES)]))
    problems = [] if context.dry else _problems(context)
    for problem in problems:
        context.note(problem)
    yield Result("gpu machine: problems", len(problems), "problems")
    if not context.dry:
        yield Result("gpu machine: copies within the GPU", context.bandwidth / 1e9, "GB/s")
        yield from _copies(context)
        yield from _new_lengths(context)


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} -"


def _problems(context: Context) -> list[str]:
    """Why this GPU can't be used as it should."""
    properties = torch.cuda.get_device_properties(0)
    context.note(
        f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
        f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors, "
        f"CUDA {torch.version.cuda}, {os.cpu_count()} CPUs"
    )
    gpus = list_gpus()
    context.note("; ".join(f"{gpu.name}, driver {gpu.driver}" for gpu in gpus) or "nvidia-smi reports no GPU")
    found = [gpu_problem(gpu, torch_cuda_version()) for gpu in gpus]
    return [problem for problem in (*found, _bitsandbytes_problem()) if problem is not None]


def _bitsandbytes_problem() -> str | None:
    """Why bitsandbytes can't quantize on the GPU; None if it can, or if it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    try:
        functional.quantize_4bit(torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16), quant_type="nf4")
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
        return f"bitsandbytes can't quantize on the GPU: {error!r}"
    return None


def _copies(context: Context) -> Iterator[Result]:
    for kind, pinned in (("pageable", False), ("pinned", True)):
        host = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=pinned)
        device = torch.empty_like(host, device="cuda")
        seconds = context.seconds(lambda host=host, device=device: device.copy_(host, non_blocking=True))  # type: ignore[misc]
        yield Result(f"gpu machine: host to device, {kind}", _COPIED / seconds / 1e9, "GB/s")


def _new_lengths(context: Context) -> Iterator[Result]:
    """FlashAttention of lengths that were never seen, over the same of a known length."""

    def attend(tokens: int) -> None:
        device = torch.device("cuda")
        q, k, v = (torch.randn(tokens, heads, 128, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8))
        varlen.forward(q, k, v, VarlenBatch.of([tokens], [tokens], device), scale=128**-0.5)

    attend(777)
    first = statistics.median(context.seconds(lambda n=n: attend(n), repeats=1, warm=0) for n in (801, 802, 803))  # type: ignore[misc]
    known = context.seconds(lambda: attend(803))
    yield Result("gpu machine: attention of a new length over a known one", first / known, "x")
