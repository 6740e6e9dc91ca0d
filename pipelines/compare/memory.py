"""What this process holds at its most."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from loramill.errors import SetupError

_PROC = Path("/proc/self")


def used_bytes(device: str) -> int:
    """The bytes held now: resident on a CPU, in tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    _trim_heap()
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Has `peak` begin anew.

    Raises:
        SetupError: the system doesn't keep these books; Linux does.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    _trim_heap()
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): the peak is set to what is resident now
    except OSError as error:
        raise SetupError(
            f"{_PROC} doesn't tell how much memory a process takes ({error}); run this on Linux."
        ) from error


def peak_bytes(device: str) -> int:
    """The most bytes held since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _trim_heap() -> None:
    """Gives free pages back: glibc keeps what loading, and rounding most of all, needed for a moment."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
