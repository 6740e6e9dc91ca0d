"""The memory of this process: current and peak."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from loramill.errors import SetupError

_PROC = Path("/proc/self")


def used_bytes(device: str) -> int:
    """Bytes in use: resident on a CPU, in tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    _trim_heap()
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Resets `peak_bytes`.

    Raises:
        SetupError: the system does not record the peak; Linux does.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    _trim_heap()
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): sets the peak to the resident size
    except OSError as error:
        raise SetupError(f"{_PROC} does not contain the memory of a process ({error}); run this on Linux.") from error


def peak_bytes(device: str) -> int:
    """Maximum bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _trim_heap() -> None:
    """Returns free pages to the system: glibc keeps what loading, and mostly rounding, needed temporarily."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
