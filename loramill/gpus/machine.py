"""The GPUs of this machine as their driver reports them; torch is not loaded."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from loramill.gpus import capability_problem
from loramill.types import GpuInfo

_COLUMNS = ("index", "uuid", "memory.total", "memory.free", "compute_cap", "driver_version", "name")
_SECONDS = 30.0
#: Fraction of the memory in the driver's report that programs can use: 0.99 on an H100.
_USABLE = 0.98
#: The oldest driver on Linux that runs programs built for a major version of CUDA (NVIDIA, "CUDA Compatibility").
_MIN_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}


class Gpu(GpuInfo):
    """A GPU of this machine.

    Attributes:
        free_bytes: memory that no process uses now.
        driver: version of the driver.
        library_cuda: the newest major version of CUDA that the driver's library runs; 0 if it is not known. NVIDIA's
            compatibility package (`cuda-compat`), which many container images have, replaces the library alone.
    """

    free_bytes: int
    driver: str
    library_cuda: int = 0


def list_gpus(environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs of this machine that `CUDA_VISIBLE_DEVICES` does not hide; none without an NVIDIA driver.

    They are those that Ray counts: `nvidia-smi` and Ray both use NVML.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={','.join(_COLUMNS)}", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = parse_gpus(ended.stdout, environment.get("CUDA_VISIBLE_DEVICES"))
    return tuple(gpu.model_copy(update={"library_cuda": _library_cuda()}) for gpu in gpus)


def _library_cuda() -> int:
    """See `Gpu.library_cuda`; no GPU is opened."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if status else version.value // 1000


def parse_gpus(report: str, visible: str | None) -> tuple[Gpu, ...]:
    """Reads the lines of `nvidia-smi`, and keeps the GPUs that `CUDA_VISIBLE_DEVICES` has; None: all.

    A GPU whose memory or capability is not reported, such as one that is split by MIG, is left out.
    """
    found: dict[str, Gpu] = {}
    for line in report.splitlines():
        fields = [field.strip() for field in line.split(",", len(_COLUMNS) - 1)]
        if len(fields) < len(_COLUMNS):
            continue
        index, uuid, total, free, capability, driver, name = fields
        numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
        if numbers and total.isdigit() and free.isdigit() and _is_visible(index, uuid, visible):
            found[index] = Gpu(
                name=name,
                bytes=round(int(total) * 2**20 * _USABLE),
                capability=(int(numbers[1]), int(numbers[2])),
                free_bytes=int(free) * 2**20,
                driver=driver,
            )
    return tuple(found.values())


def _is_visible(index: str, uuid: str, visible: str | None) -> bool:
    if visible is None:
        return True
    for entry in map(str.strip, visible.split(",")):
        if not entry or entry == "-1":
            return False  # CUDA ignores what follows an invalid entry
        if entry == index or (entry.startswith("GPU-") and uuid.startswith(entry)):
            return True
    return False


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, such as "13.0"; None for a build without CUDA."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        version = Path(folder) / "version.py"
        if version.is_file():
            cuda = runpy.run_path(str(version)).get("cuda")
            return None if cuda is None else str(cuda)
    return None


def driver_problem(gpu: Gpu, cuda: str) -> str | None:
    """Why a GPU's driver can't run a torch that was built for this CUDA version, as a sentence; None if it can."""
    major = int(cuda.partition(".")[0])
    needed = _MIN_DRIVERS.get(major)
    have = tuple(int(number) for number in re.findall(r"\d+", gpu.driver)[:2])
    if needed is None or not have or have >= needed or gpu.library_cuda >= major:
        return None
    return (
        f"The NVIDIA driver {gpu.driver} is too old for a torch built for CUDA {cuda}, which needs {needed[0]} or "
        "newer: update the driver, or install a torch for an older CUDA (see pytorch.org)."
    )


def gpu_problem(gpu: Gpu, cuda: str | None) -> str | None:
    """Why torch can't use a GPU, as a sentence; None if it can.

    Args:
        gpu: the GPU.
        cuda: the CUDA version that torch was built for; None: a build without CUDA.
    """
    if cuda is None:
        return "The installed torch is a build without CUDA: install one built for CUDA (see pytorch.org)."
    return capability_problem(gpu.name, gpu.capability) or driver_problem(gpu, cuda)
