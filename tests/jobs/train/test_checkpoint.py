"""Checkpoints come back bit for bit, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from loramill.errors import ArtifactCorrupt, DiskFull, SetupError
from loramill.jobs.train.checkpoint import CheckpointData, RunState, best, latest, write
from loramill.jobs.train.checkpoint_store import open_checkpoint_store
from loramill.types import JobSpec

SPEC = JobSpec(base="f" * 64, adapter="acme/support", train="file-1", steps=30, batch_size=4)


def at(step: int, best_step: int | None = None, *, pending: bool = False) -> CheckpointData:
    generator = torch.Generator().manual_seed(step)
    parts = [{"b.lora_A.weight": torch.randn(3, 5, generator=generator), "a": torch.randn(2)} for _ in range(4)]
    figures = {"loss": 0.1 + step, "grad_norm": 1e-300}
    run_state = RunState(step, step * 100, figures, pending, best_step, None if best_step is None else 1 / 3, stale=2)
    return CheckpointData(run_state, *parts)


def step_of(found: CheckpointData | None) -> int | None:
    return None if found is None else found.run_state.step


@pytest.fixture(params=["folder", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """A folder for checkpoints that does not exist yet."""
    folder = tmp_path / "a job"
    yield {"folder": folder, "file": folder.as_uri(), "memory": f"memory://{tmp_path.name}/job"}[request.param]
    fsspec.filesystem("memory").store.clear()


def test_a_checkpoint_is_read_as_it_was_written(location: Path | str) -> None:
    written = at(7, best_step=5)
    assert latest(location, SPEC) is None
    write(location, SPEC, written)
    read = latest(location, SPEC)
    assert read is not None
    assert read.run_state == written.run_state
    for part in ("weights", "first_moments", "second_moments", "state"):
        torch.testing.assert_close(getattr(read, part), getattr(written, part), rtol=0, atol=0)


def test_the_last_two_are_kept(location: Path | str) -> None:
    for step in (5, 10, 15):
        write(location, SPEC, at(step))
    assert files(location) == [10, 15]
    assert step_of(latest(location, SPEC)) == 15
    assert step_of(best_of(location)) == 15


def test_the_best_of_each_kept_checkpoint_is_kept(location: Path | str) -> None:
    for step, best_step in ((5, 5), (10, 10), (15, 10), (20, 10), (25, 10)):
        write(location, SPEC, at(step, best_step))
    assert files(location) == [10, 20, 25]
    assert step_of(best_of(location)) == 10
    write(location, SPEC, at(30, 30))
    assert files(location) == [10, 25, 30]  # were the last damaged, 10 would still be the best
    assert step_of(best_of(location)) == 30


def best_of(location: Path | str) -> CheckpointData:
    last = latest(location, SPEC)
    assert last is not None
    return best(location, SPEC, last)


def files(location: Path | str) -> list[int]:
    return sorted(int(name.split("-")[1].rstrip("ab")) for name in open_checkpoint_store(location).names())


def test_a_checkpoint_before_validation_sorts_before_the_validated(location: Path | str) -> None:
    write(location, SPEC, at(8, pending=True))
    write(location, SPEC, at(8, best_step=8))
    read = latest(location, SPEC)
    assert read is not None and not read.run_state.pending
    assert step_of(best_of(location)) == 8


def test_a_missing_best_checkpoint_is_reported(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, SPEC, at(step, 5))
    next(tmp_path.glob("*-00000005b-*")).unlink()
    with pytest.raises(ArtifactCorrupt, match="of step 5, is damaged or missing"):
        best_of(tmp_path)


def test_checkpoints_of_another_spec_are_neither_read_nor_removed(tmp_path: Path) -> None:
    other = SPEC.model_copy(update={"learning_rate": 0.5})
    write(tmp_path, SPEC, at(25))
    assert latest(tmp_path, other) is None
    for step in (5, 10, 15):
        write(tmp_path, other, at(step))
    assert step_of(latest(tmp_path, SPEC)) == 25


def test_a_spec_from_before_added_and_renamed_fields_keeps_its_key(tmp_path: Path) -> None:
    """Its spec keeps the key that it had then."""
    old = JobSpec.model_validate(
        {
            "base": "f" * 64,
            "adapter": "acme/support",
            "train": "file-1",
            "steps": 30,
            "batch_size": 8,
            "train_on": "last",
        }
    )
    write(tmp_path, old, at(10))
    assert [file.name.partition("-")[0] for file in tmp_path.iterdir()] == ["2b258d03176e46b0"]
    assert latest(tmp_path, old.model_copy(update={"epochs": 3})) is None


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, SPEC, at(10))
    write(tmp_path, SPEC, at(20))
    (last,) = tmp_path.glob("*-00000020b-*")
    content = last.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    last.write_bytes({"torn": content[:-20], "flipped": flipped, "empty": b""}[damage])
    assert step_of(latest(tmp_path, SPEC)) == 10


def test_a_partly_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "xyz.partial").write_bytes(b"half")
    assert latest(tmp_path, SPEC) is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SPEC, at(10))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="free some space"):
        write(tmp_path, SPEC, at(20))
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    assert step_of(latest(tmp_path, SPEC)) == 10


def test_a_url_with_an_unknown_protocol_is_reported() -> None:
    with pytest.raises(SetupError, match="store 'nosuch://x' cannot be used"):
        latest("nosuch://x", SPEC)
