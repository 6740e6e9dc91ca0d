"""Headers of safetensors files, against files that the library wrote, and against broken ones."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save

from loramill.storage.safetensors_header import TensorEntry, read_header


def read(content: bytes) -> Any:
    return read_header(io.BytesIO(content), len(content))


def file_of(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_written_by_the_library() -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    content = save(tensors, metadata={"format": "pt"})
    header = read(content)
    assert header.metadata == {"format": "pt"}
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (2,)),
    }
    entry = header.tensors["a"]
    assert content[entry.start : entry.stop] == tensors["a"].numpy().tobytes()


def test_a_file_without_tensors() -> None:
    assert dict(read(file_of({})).tensors) == {}


def test_offsets_count_from_the_beginning_of_the_file() -> None:
    content = file_of({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, b"xy")
    assert read(content).tensors["a"] == TensorEntry("F16", (1,), len(content) - 2, len(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\xff" * 8 + b"{}", "cut short"),
        (file_of([]), "not a JSON object"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}), "entry for 'a' is broken"),
        (file_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "entry for 'a' is broken"),
        (file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}), "entry for 'a' is broken"),
        (file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12"), "not what its header says"),
        (file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"), "not what its header says"),
    ],
)
def test_a_broken_file_is_a_value_error(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)
