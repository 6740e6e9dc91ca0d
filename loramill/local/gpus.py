"""Checks of this machine's GPUs for `loramill up` and `loramill doctor`."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramill.errors import LoramillError, NotEnoughMemory, SetupError
from loramill.gpus import CONTEXT_BYTES, FP8_ON_CPU, capability_problem
from loramill.gpus.machine import Gpu, driver_problem, list_gpus, torch_cuda_version
from loramill.gpus.sharing import DeviceDecision, decide_devices
from loramill.local.findings import Finding, Status
from loramill.local.machine import free_memory
from loramill.models import smollm2
from loramill.models.catalog import NATIVE_ARCHITECTURES, Base
from loramill.settings import Settings
from loramill.sizing.anatomy import Anatomy, anatomy, find_config, read_config
from loramill.sizing.memory import base_bytes
from loramill.sizing.serving import EngineLimits, planned_limits, served_weight_bytes
from loramill.types import GpuInfo

#: Advice where the memory is too small; experts can't be quantized.
_QUANTIZE = 'quantize the base (quantization = "nf4"), '


@dataclass(frozen=True, slots=True)
class GpuSetup:
    """What decides whether GPUs can be used.

    Attributes:
        cuda: CUDA version that torch was built for; None: a build without CUDA.
        visible: the GPUs that torch sees.
        machine: the GPUs that the driver reports.
        compiler: the C compiler that Triton finds.
        header: Python's C header, which Triton needs; None if it is missing.
        bitsandbytes: why bitsandbytes can't use CUDA; None if it can, or is not installed.
    """

    cuda: str | None
    visible: Sequence[GpuInfo]
    machine: Sequence[Gpu]
    compiler: str | None
    header: Path | None
    bitsandbytes: str | None


def choose_devices(settings: Settings, gpus: Sequence[Gpu], architecture: str | None = None) -> DeviceDecision:
    """Decides the devices for this machine; see `decide_devices`.

    Args:
        settings: the settings.
        gpus: the machine's.
        architecture: that of the base; engines run others than the native ones on the CPU. None: a native one.
    """
    cuda = torch_cuda_version() if gpus else None
    return decide_devices(settings, gpus, cuda, native=architecture in (None, *NATIVE_ARCHITECTURES))


def settings_of_pool(settings: Settings) -> Settings:
    """The settings with the devices of this machine, as `loramill up` decides them, to size jobs with.

    They are unchanged where the settings require a GPU that this machine does not have: other machines train.
    """
    try:
        return choose_devices(settings, list_gpus()).settings if settings.jobs.use_gpu == "auto" else settings
    except SetupError:
        return settings


def check_gpu_memory(base: Base, settings: Settings, gpus: Sequence[Gpu]) -> None:
    """Checks whether the base fits into the shares of a GPU that engines and sessions take, and into its free memory.

    Args:
        base: the base.
        settings: with decided devices.
        gpus: the machine's; the smallest counts.

    Raises:
        NotEnoughMemory: it does not; the message has the figures and what to change.
    """
    if not gpus or (settings.serve.device != "cuda" and not settings.jobs.on_gpu):
        return
    gpu, shape = min(gpus, key=lambda gpu: gpu.bytes), anatomy(read_config(str(base.folder)))
    if settings.serve.device == "cuda":
        engine_limits(shape, settings, gpu)
        needed, free = (
            CONTEXT_BYTES + served_weight_bytes(shape, settings.serve.served_quantization(base.quantization)),
            max(gpu.free_bytes for gpu in gpus),
        )
        if needed > free:
            raise NotEnoughMemory(
                f"An engine needs more than {needed / 1e9:.1f} GB of a GPU for the base {base.name}, and "
                f"{free / 1e9:.1f} GB are free: end other programs that use it (see nvidia-smi)."
            )
    if settings.jobs.on_gpu:
        budget = int(settings.jobs.gpu_share * gpu.bytes)
        needed = CONTEXT_BYTES + base_bytes(shape, base.quantization, "cuda")
        if needed > budget:
            raise NotEnoughMemory(
                f"A training session needs {needed / 1e9:.1f} GB for the base {base.name}, and has "
                f"{budget / 1e9:.1f} GB of {gpu}: lower jobs.per_gpu or serve.gpu_fraction, "
                f"{'' if shape.experts else _QUANTIZE}or set jobs.use_gpu to false."
            )


def engine_limits(base: Anatomy, settings: Settings, gpu: GpuInfo) -> EngineLimits:
    """The limits that an engine of these settings will have on a GPU.

    Raises:
        NotEnoughMemory: the base leaves no memory for it.
    """
    host = free_memory()
    return planned_limits(gpu, base, settings.quantization, settings.serve, 0 if host is None else host.free_bytes)


def triton_compiler() -> str | None:
    """The C compiler with which Triton builds its launcher, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path | None:
    """Python's C header, which Triton's launcher includes, or None."""
    scheme = sysconfig.get_default_scheme()
    # As Triton does (3.7, triton.runtime.build): Debian's own scheme has another folder.
    folder = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    header = Path(folder) / "Python.h"
    return header if header.is_file() else None


def gpu_findings(setup: GpuSetup, settings: Settings) -> Iterator[Finding]:
    """Judges the GPUs, and what is needed to use them; a machine without a GPU has one finding."""
    required = settings.serve.device == "cuda" or settings.jobs.on_gpu
    seen = _judge_gpus(setup, required)
    yield seen
    if settings.serve.quantization == "fp8" and not setup.visible and seen.status is Status.OK:
        found = '"fp8" without a GPU, unless other nodes have them'
        yield Finding(what="serve.quantization", status=Status.WARN, found=found, fix=FP8_ON_CPU)
    if not setup.visible and not setup.machine:
        return
    serious = Status.ERROR if required else Status.WARN
    if setup.machine and setup.cuda is not None:
        problem = driver_problem(setup.machine[0], setup.cuda)
        found = f"{setup.machine[0].driver}, for torch's CUDA {setup.cuda}"
        yield Finding(what="gpu driver", status=serious if problem else Status.OK, found=found, fix=problem or "")
    if setup.visible:
        yield _judge_triton(setup)
        yield _judge_bitsandbytes(setup, settings)
        yield _judge_sharing(setup, settings)


def _judge_gpus(setup: GpuSetup, required: bool) -> Finding:
    serious = Status.ERROR if required else Status.WARN
    if setup.visible:
        found = f"{', '.join(map(str, setup.visible))}, CUDA {setup.cuda}"
        problems = [capability_problem(gpu.name, gpu.capability) for gpu in setup.visible]
        if problem := next(filter(None, problems), None):
            return Finding(what="gpu", status=serious, found=found, fix=f"{problem} Hide it by CUDA_VISIBLE_DEVICES.")
        return Finding(what="gpu", status=Status.OK, found=found)
    if setup.machine:
        fix = "Install a torch built for CUDA (see pytorch.org)." if setup.cuda is None else "Look at nvidia-smi."
        found = f"the driver reports {', '.join(map(str, setup.machine))}, but torch sees no GPU"
        return Finding(what="gpu", status=serious, found=found, fix=fix)
    if required:
        fix = "Set LORAMILL_SERVE__DEVICE and LORAMILL_JOBS__USE_GPU to auto, unless other nodes have the GPUs."
        return Finding(what="gpu", status=Status.WARN, found="none, but the settings require one", fix=fix)
    return Finding(what="gpu", status=Status.OK, found="none; everything runs on the CPU")


def _judge_triton(setup: GpuSetup) -> Finding:
    if setup.compiler is None:
        fix = "Install gcc (Debian, Ubuntu: apt-get install build-essential)."
        return Finding(what="triton", status=Status.ERROR, found="no C compiler for its launcher", fix=fix)
    if setup.header is None:
        fix = "Install Python's headers (Debian, Ubuntu: apt-get install python3-dev)."
        return Finding(what="triton", status=Status.ERROR, found="no Python.h for its launcher", fix=fix)
    return Finding(what="triton", status=Status.OK, found=f"builds its launcher with {setup.compiler}")


def _judge_bitsandbytes(setup: GpuSetup, settings: Settings) -> Finding:
    if setup.bitsandbytes is None:
        return Finding(what="bitsandbytes on the gpu", status=Status.OK, found="its CUDA library loads")
    status = Status.ERROR if settings.quantization == "nf4" else Status.WARN
    fix = f'Only quantization = "nf4" needs it: pip install --force-reinstall bitsandbytes, for CUDA {setup.cuda}.'
    return Finding(what="bitsandbytes on the gpu", status=status, found=setup.bitsandbytes, fix=fix)


def _judge_sharing(setup: GpuSetup, settings: Settings) -> Finding:
    """Shows how engines and sessions will share the GPUs, and whether the memory is free."""
    what = "gpu shares"
    if not setup.machine:
        fix = "Install nvidia-smi; in a container, set NVIDIA_DRIVER_CAPABILITIES to compute,utility."
        found = "nvidia-smi reports no GPU, so `loramill up` and Ray use the CPU"
        return Finding(what=what, status=Status.WARN, found=found, fix=fix)
    try:
        shape: Anatomy | None = None
        if Path(settings.base).is_dir() or settings.base == smollm2.NAME:  # nothing is downloaded
            shape = anatomy(find_config(settings.base, settings.cache))
        native = shape is None or shape.architecture in NATIVE_ARCHITECTURES
        decision = decide_devices(settings, setup.machine, setup.cuda, native=native)
        found = decision.explanation or "the settings use the CPU alone"
        if shape is not None and decision.settings.serve.device == "cuda":
            gpu = min(setup.visible, key=lambda gpu: gpu.bytes)
            found += f" Engine: {engine_limits(shape, decision.settings, gpu)}."
    except LoramillError as error:
        return Finding(what=what, status=Status.ERROR, found="they do not suffice", fix=error.message)
    taken = [gpu for gpu in setup.machine if gpu.free_bytes < 0.9 * gpu.bytes]
    if taken:
        used = ", ".join(f"{gpu.name}: {gpu.free_bytes / 2**30:.1f} GiB free" for gpu in taken)
        fix = f"Other programs use the GPUs ({used}): end them, unless they belong to loramill."
        return Finding(what=what, status=Status.WARN, found=found, fix=fix)
    return Finding(what=what, status=Status.OK, found=found)
