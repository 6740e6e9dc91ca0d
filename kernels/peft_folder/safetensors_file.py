"""Reading a safetensors file in one piece: the library makes a copy and a call for each of hundreds of small tensors.

The format: eight bytes of the header's length, little-endian; the header, a JSON object of each tensor's dtype, shape
and bytes from the header's end (https://huggingface.co/docs/safetensors); the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loramill.kernels.memory import Allocator, host_memory

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_tensors(path: Path, allocate: Allocator = host_memory) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; they share its bytes, which go to `memory`.

    Raises:
        OSError: it can't be read.
        ValueError: it is no such file, or a tensor is of none of F32, BF16 and F16; the message says what is wrong.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        content = allocate(size).numpy().data
        if file.readinto(content) != size:
            raise ValueError("the file was cut short while it was read")
    length = int.from_bytes(content[:8], "little")
    if size < 8 or length > size - 8:
        raise ValueError("the file is shorter than its header says")
    header = json.loads(bytes(content[8 : 8 + length]))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: _tensor(name, entry, data) for name, entry in header.items()}


def _tensor(name: str, entry: Any, data: memoryview) -> torch.Tensor:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = _DTYPES.get(kind)
        if dtype is not None:
            if start == stop:  # frombuffer refuses to read nothing
                return torch.empty(0, dtype=dtype).view(shape)
            count = (stop - start) // dtype.itemsize
            return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the header's entry for '{name}' is broken, or the file was cut short: {error}") from error
    raise ValueError(f"'{name}' is {kind}; save it in one of {', '.join(_DTYPES)}")


def first_non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None if there is none."""
    for name, tensor in tensors.items():
        # A sum is one pass without a copy. One of finite values may overflow, which the slow look then tells.
        if not math.isfinite(tensor.sum(dtype=torch.float32).item()) and not tensor.isfinite().all():
            return name
    return None
