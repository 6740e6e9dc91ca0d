"""Checks of what may crash a process (torch, bitsandbytes, the kernels, Ray), each in its own process."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loramill.gpus.machine import list_gpus
from loramill.local.findings import Finding, Status
from loramill.local.gpus import GpuSetup, gpu_findings, python_header, triton_compiler
from loramill.local.machine import c_compiler
from loramill.local.packages import TESTED_VERSIONS, fix_of
from loramill.plural import counted
from loramill.settings import Settings
from loramill.types import GpuInfo

_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "threads": torch.get_num_threads(),
    "capability": torch.backends.cpu.get_cpu_capability(),
    "cuda": torch.version.cuda,
    "gpus": [{"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
             for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))] if cuda else [],
}))
"""
_BITSANDBYTES = """
import json
from bitsandbytes.cextension import lib
usable = type(lib).compiled_with_cuda
print(json.dumps(None if usable else vars(lib).get("error_msg") or "only its CPU library loads"))
"""
_KERNELS = """
import json, sys, torch
from loramill.kernels import backend
device = sys.argv[1] if sys.argv[1] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps([device, backend(device).name]))
"""
_RAY = "import json, ray; from ray import serve, train; print(json.dumps(ray.__version__))"
_PROBE_SECONDS = 180.0
#: Vector instructions that kernels are compiled for, by their flag in /proc/cpuinfo.
_CPU_FEATURES = (("avx2", "AVX2"), ("avx512f", "AVX512"), ("avx512_bf16", "AVX512-BF16"))


class _ProbeError(Exception):
    """A probe's process failed; the text is the last line of its output."""


def hardware(settings: Settings) -> Iterable[Finding]:
    """Reports the processor, threads and GPUs as torch sees them."""
    try:
        seen = _probe(_TORCH)
    except _ProbeError as error:
        fix = fix_of(error, "pip install --force-reinstall torch")
        yield Finding(what="torch starts", status=Status.ERROR, found=str(error), fix=fix)
        return
    yield cpu(seen["capability"], _cpu_flags(), os.cpu_count() or 1, seen["threads"])
    visible = [GpuInfo.model_validate(gpu) for gpu in seen["gpus"]]
    setup = GpuSetup(
        seen["cuda"], visible, list_gpus(), triton_compiler(), python_header(), _bitsandbytes() if visible else None
    )
    yield from gpu_findings(setup, settings)


def cpu(capability: str, flags: frozenset[str], cores: int, threads: int) -> Finding:
    """Reports the processor's vector instructions, cores and threads."""
    features = [name for flag, name in _CPU_FEATURES if flag in flags]
    found = f"{', '.join(features) or capability}; {cores} cores, torch uses {counted(threads, 'thread')}"
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in features and "AVX" not in capability:
        return Finding(
            what="cpu", status=Status.WARN, found=found, fix="Without AVX2 everything is slow: use another processor."
        )
    return Finding(what="cpu", status=Status.OK, found=found)


def kernels(settings: Settings) -> Iterable[Finding]:
    """Reports the kernels' backend on the engine's device, and the C compiler."""
    try:
        device, name = _probe(_KERNELS, settings.serve.device)
        yield Finding(what="kernels", status=Status.OK, found=f"{name}, on {device}")
    except _ProbeError as error:
        fix = fix_of(error, "Unset LORAMILL_KERNELS; if that does not help, reinstall loramill.")
        yield Finding(what="kernels", status=Status.ERROR, found=str(error), fix=fix)
    compiler = c_compiler()
    if compiler is None:
        fix = "Install gcc (Debian, Ubuntu: apt-get install build-essential)."
        found = "none; native kernels can't be compiled"
        yield Finding(what="C compiler", status=Status.WARN, found=found, fix=fix)
    else:
        yield Finding(what="C compiler", status=Status.OK, found=compiler)


def ray(_: Settings) -> Iterable[Finding]:
    """Checks that Ray, Ray Train and Ray Serve can be imported."""
    try:
        yield Finding(what="ray starts", status=Status.OK, found=_probe(_RAY))
    except _ProbeError as error:
        fix = fix_of(error, f"pip install --force-reinstall 'ray[train,serve]=={TESTED_VERSIONS['ray']}'")
        yield Finding(what="ray starts", status=Status.ERROR, found=str(error), fix=fix)


def _bitsandbytes() -> str | None:
    """Why bitsandbytes can't use CUDA; None if it can, or is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    try:
        reason = _probe(_BITSANDBYTES)
    except _ProbeError as error:
        return str(error)
    return None if reason is None else str(reason).splitlines()[0]


def _probe(code: str, *arguments: str) -> Any:
    """Runs Python code in its own process; returns the JSON that it prints."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _ProbeError(f"does not start within {_PROBE_SECONDS:.0f} s") from error
    if ended.returncode < 0:
        raise _ProbeError(f"killed by {signal.Signals(-ended.returncode).name} at start")
    if ended.returncode:
        raise _ProbeError((ended.stderr.strip() or "failed without output").splitlines()[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def _cpu_flags() -> frozenset[str]:
    """Returns the CPU flags from /proc/cpuinfo, if it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
