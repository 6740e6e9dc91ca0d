"""Reads a safetensors file at once: the library makes a copy and a call for each of hundreds of small tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from loramill.kernels.memory import Allocator, host_memory
from loramill.storage.safetensors_header import TensorEntry, read_header

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_tensors(path: Path, allocate: Allocator = host_memory) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; they share its bytes, which are in memory from `allocate`.

    Raises:
        OSError: The file can't be read.
        ValueError: It is not a safetensors file, or a tensor is not F32, BF16 or F16; the message says which.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        header = read_header(file, size)
        file.seek(0)
        content = allocate(size).numpy().data
        if file.readinto(content) != size:
            raise ValueError("the file was cut short while it was read")
    return {name: _tensor(name, entry, content) for name, entry in header.tensors.items()}


def _tensor(name: str, entry: TensorEntry, content: memoryview) -> torch.Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"'{name}' is {entry.dtype}; save it in one of {', '.join(_DTYPES)}")
    if entry.start == entry.stop:  # frombuffer refuses to read nothing
        return torch.empty(0, dtype=dtype).view(entry.shape)
    try:
        count = (entry.stop - entry.start) // dtype.itemsize
        return torch.frombuffer(content, dtype=dtype, count=count, offset=entry.start).view(entry.shape)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the header's entry for '{name}' is broken: {error}") from error


def first_non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None if there is none."""
    for name, tensor in tensors.items():
        # A sum is one pass without a copy. That of finite values may overflow, which the slower check then finds.
        if not math.isfinite(tensor.sum(dtype=torch.float32).item()) and not tensor.isfinite().all():
            return name
    return None
