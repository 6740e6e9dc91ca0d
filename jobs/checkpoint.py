"""A job's checkpoints: files that are whole or not there.

A file is named `<key>-<step>-<sha256 of its content>.safetensors`. The key is of the job's spec, so a checkpoint of
another spec is never met; the hash tells a torn or damaged file from a whole one. A checkpoint is written to another
name, synced and renamed; only then do the ones before the last two go.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from loramill.durable import sync
from loramill.errors import DiskFull
from loramill.types import JobSpec

log = logging.getLogger(__name__)

#: Checkpoints kept: the last, and the one before in case the last is damaged.
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a job stands after `step` optimizer steps.

    Attributes:
        tokens: tokens trained on so far.
        weights: the adapter's tensors under their names in PEFT's file.
        first_moments, second_moments: AdamW's, under the same names.
    """

    step: int
    tokens: int
    weights: dict[str, torch.Tensor]
    first_moments: dict[str, torch.Tensor]
    second_moments: dict[str, torch.Tensor]


def write(folder: Path, spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Makes `checkpoint` the last of `spec` in `folder`.

    Raises:
        DiskFull: it doesn't fit; those before it stay.
    """
    parts = {
        "weight": checkpoint.weights,
        "first_moment": checkpoint.first_moments,
        "second_moment": checkpoint.second_moments,
    }
    tensors = {f"{part} {name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    content = save(tensors, metadata={"state": json.dumps({"step": checkpoint.step, "tokens": checkpoint.tokens})})
    name = f"{_key(spec)}-{checkpoint.step:08d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_whole(folder / name, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"No room for a checkpoint of {len(content) / 1e6:.0f} MB in {folder}: free some space; "
            "the job goes on from the checkpoint before."
        ) from error
    for old in _files(folder, spec)[KEPT:]:
        old.unlink(missing_ok=True)


def latest(folder: Path, spec: JobSpec) -> Checkpoint | None:
    """The last whole checkpoint of `spec` in `folder`; None if there is none."""
    for file in _files(folder, spec):
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() == file.stem.rpartition("-")[2]:
            return _parse(content)
        log.warning("the checkpoint %s is damaged; going on from the one before", file)
    return None


def _files(folder: Path, spec: JobSpec) -> list[Path]:
    return sorted(folder.glob(f"{_key(spec)}-*.safetensors"), reverse=True)


def _key(spec: JobSpec) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]


def _parse(content: bytes) -> Checkpoint:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    state = json.loads(header["__metadata__"]["state"])
    parts: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "first_moment": {}, "second_moment": {}}
    for key, tensor in load(content).items():
        part, _, name = key.partition(" ")
        parts[part][name] = tensor
    return Checkpoint(state["step"], state["tokens"], parts["weight"], parts["first_moment"], parts["second_moment"])


def _write_whole(file: Path, content: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    sync(file.parent)
