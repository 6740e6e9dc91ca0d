"""A job's checkpoints: files, each complete or absent, in a folder or at an fsspec URL that every node can access.

A file is named `<key>-<step><a or b>-<best step>-<sha256 of its content>.safetensors`. The key is a hash of the job's
spec, so that a checkpoint of another spec is never read; the content's hash shows a damaged file. The last two are
kept, since the last may be damaged, and the best checkpoint that each of them names.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save

from loramill.errors import ArtifactCorrupt
from loramill.jobs.train.checkpoint_store import CheckpointStore, open_checkpoint_store
from loramill.storage.safetensors_header import read_header
from loramill.types import JobSpec

log = logging.getLogger(__name__)

#: Number of checkpoints that are kept besides the best.
KEEP_LAST = 2
#: Version of the file format, a part of the key: a file of another version is not read.
FORMAT_VERSION = 2
#: Fields that older specs do not have; their defaults mean what was done without them.
_ADDED_FIELDS = ("epochs", "objective", "dpo_loss", "beta", "desirable_weight", "undesirable_weight", "candidates")
#: Fields by the names that they had when the first checkpoints were written.
_RENAMED_FIELDS = {"train_on": "learn"}

_PARTS = ("weight", "first_moment", "second_moment", "state", "reference")


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a job after `step` optimizer steps, without its tensors. The names are those in the files.

    Attributes:
        tokens: tokens trained on so far, prompts included.
        figures: loss, accuracy, learning_rate and grad_norm of the last step; valid_loss and valid_accuracy if the job
            was validated after it.
        pending: a validation is due after this step and not yet done.
        best_step, best_loss: of the lowest validation loss; None before the first validation.
        stale: number of validations since the best.
        finished: no step is left to train.
    """

    step: int = 0
    tokens: int = 0
    figures: dict[str, float] | None = None
    pending: bool = False
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointData:
    """Everything that a job resumes from.

    Attributes:
        weights: the trained weights, under their names in PEFT's file.
        first_moments, second_moments: AdamW's moments, under the same names.
        state: other tensors of the method.
        reference: preference tuning: log-probabilities of the model before the first step, by file of examples.
    """

    run_state: RunState
    weights: dict[str, torch.Tensor]
    first_moments: dict[str, torch.Tensor]
    second_moments: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor] = field(default_factory=dict)


def write(folder: Path | str, spec: JobSpec, checkpoint: CheckpointData) -> None:
    """Writes `checkpoint` as the last one of `spec` in `folder`, and removes older ones.

    Raises:
        DiskFull: no space for it; the earlier checkpoints stay.
    """
    parts = (
        checkpoint.weights,
        checkpoint.first_moments,
        checkpoint.second_moments,
        checkpoint.state,
        checkpoint.reference,
    )
    tensors = {
        f"{part} {name}": tensor for part, named in zip(_PARTS, parts, strict=True) for name, tensor in named.items()
    }
    content = save(tensors, metadata={"standing": json.dumps(asdict(checkpoint.run_state))})
    store = open_checkpoint_store(folder)
    store.write(_name(spec, checkpoint.run_state, content), content)
    names = _names(store, spec)
    best_steps = {name.split("-")[2] for name in names[:KEEP_LAST]}
    for old in names[KEEP_LAST:]:
        if old.split("-")[1].rstrip("ab") not in best_steps:
            store.remove(old)


def latest(folder: Path | str, spec: JobSpec) -> CheckpointData | None:
    """Returns the last undamaged checkpoint of `spec` in `folder`, or None if there is none.

    Raises:
        ArtifactCorrupt: it can't be read.
    """
    store = open_checkpoint_store(folder)
    return next((found for name in _names(store, spec) if (found := _read(store, name)) is not None), None)


def best(folder: Path | str, spec: JobSpec, last: CheckpointData) -> CheckpointData:
    """Returns the checkpoint of the lowest validation loss up to `last`; without validations `last` itself.

    Raises:
        ArtifactCorrupt: it is damaged or missing.
    """
    if last.run_state.best_step in (None, last.run_state.step):
        return last
    store = open_checkpoint_store(folder)
    for name in _names(store, spec):
        if name.split("-")[1] == f"{last.run_state.best_step:08d}b" and (found := _read(store, name)) is not None:
            return found
    raise ArtifactCorrupt(
        f"The best checkpoint, of step {last.run_state.best_step}, is damaged or missing in {folder}: "
        "submit the job again."
    )


def _name(spec: JobSpec, run_state: RunState, content: bytes) -> str:
    step = f"{run_state.step:08d}{'a' if run_state.pending else 'b'}"
    best_step = "none" if run_state.best_step is None else f"{run_state.best_step:08d}"
    return f"{_key(spec)}-{step}-{best_step}-{hashlib.sha256(content).hexdigest()}.safetensors"


def _names(store: CheckpointStore, spec: JobSpec) -> list[str]:
    """Returns the names of the spec's checkpoints, the last first."""
    key = _key(spec)
    return sorted(
        (name for name in store.names() if name.startswith(key) and name.endswith(".safetensors")), reverse=True
    )


def _key(spec: JobSpec) -> str:
    # A spec keeps the key that it had before fields were added or renamed, so that an older job resumes.
    unknown = {name for name in _ADDED_FIELDS if getattr(spec, name) == JobSpec.model_fields[name].default}
    text = spec.model_dump_json(exclude=unknown)
    for new, old in _RENAMED_FIELDS.items():
        text = text.replace(f'"{new}":', f'"{old}":')
    return hashlib.sha256(f"{FORMAT_VERSION} {text}".encode()).hexdigest()[:16]


def _read(store: CheckpointStore, name: str) -> CheckpointData | None:
    """Reads a checkpoint; returns None if it is damaged."""
    content = store.read(name)
    if hashlib.sha256(content).hexdigest() == name.removesuffix(".safetensors").rpartition("-")[2]:
        return _parse(content)
    log.warning("the checkpoint %s in %s is damaged; using the one before", name, store.location)
    return None


def _parse(content: bytes) -> CheckpointData:
    metadata = read_header(io.BytesIO(content), len(content)).metadata
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in load(content).items():
        part, _, name = key.partition(" ")
        parts[part][name] = tensor
    return CheckpointData(RunState(**json.loads(metadata["standing"])), *(parts[part] for part in _PARTS))
