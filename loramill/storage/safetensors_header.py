"""The header of a safetensors file, without torch.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, little-endian; the
header, a JSON object with the dtype, the shape and the byte range of each tensor; the bytes of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        dtype: name of the dtype, such as BF16.
        shape: sizes of its dimensions.
        start, stop: byte range, counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file by name, and its metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, size: int) -> SafetensorsHeader:
    """Reads the header at the beginning of a file.

    Args:
        size: size of the file in bytes.

    Raises:
        ValueError: the file is not a safetensors file, or is cut short; the message says what is wrong.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError("the file is cut short: it is shorter than its header says")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    if size != max((entry.stop for entry in tensors.values()), default=8 + length):
        raise ValueError("its size is not what its header says")
    return SafetensorsHeader(tensors, metadata)


def _entry(name: str, value: object, offset: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
            0 <= start <= stop and all(isinstance(size, int) and size >= 0 for size in shape)
        ):
            return TensorEntry(dtype, tuple(shape), offset + start, offset + stop)
    raise ValueError(f"the header's entry for '{name}' is broken")
