"""Checkpoints come back bit for bit, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from loramill.errors import DiskFull
from loramill.jobs.checkpoint import Checkpoint, latest, write
from loramill.types import JobSpec

SPEC = JobSpec(base="f" * 64, adapter="acme/support", train="file-1", steps=30, batch_size=4)


def at(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    parts = [{"b.lora_A.weight": torch.randn(3, 5, generator=generator), "a": torch.randn(2)} for _ in range(3)]
    return Checkpoint(step, step * 100, *parts)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    written = at(7)
    write(tmp_path / "new", SPEC, written)
    read = latest(tmp_path / "new", SPEC)
    assert read is not None
    assert (read.step, read.tokens) == (7, 700)
    for part in ("weights", "first_moments", "second_moments"):
        torch.testing.assert_close(getattr(read, part), getattr(written, part), rtol=0, atol=0)


def test_keeps_the_last_two(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, SPEC, at(step))
    assert len(list(tmp_path.iterdir())) == 2
    read = latest(tmp_path, SPEC)
    assert read is not None and read.step == 15


def test_another_spec_has_no_checkpoint_here_and_loses_none(tmp_path: Path) -> None:
    other = SPEC.model_copy(update={"learning_rate": 0.5})
    write(tmp_path, SPEC, at(25))
    assert latest(tmp_path, other) is None
    for step in (5, 10, 15):
        write(tmp_path, other, at(step))
    read = latest(tmp_path, SPEC)
    assert read is not None and read.step == 25


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    write(tmp_path, SPEC, at(10))
    write(tmp_path, SPEC, at(20))
    (last,) = tmp_path.glob("*-00000020-*")
    content = last.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    last.write_bytes({"torn": content[:-20], "flipped": flipped, "empty": b""}[damage])
    read = latest(tmp_path, SPEC)
    assert read is not None and read.step == 10


def test_a_half_written_one_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "xyz.partial").write_bytes(b"half")
    assert latest(tmp_path, SPEC) is None


def test_a_full_disk_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SPEC, at(10))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="free some space"):
        write(tmp_path, SPEC, at(20))
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    read = latest(tmp_path, SPEC)
    assert read is not None and read.step == 10
