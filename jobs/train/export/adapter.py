"""Exports an adapter's files from the checkpoints of its job."""

from __future__ import annotations

from pathlib import Path

from loramill.errors import ArtifactMissing
from loramill.jobs.train import checkpoint
from loramill.jobs.train.checkpoint import CheckpointData
from loramill.jobs.train.methods import adapter_files
from loramill.types import JobSpec


def export_adapter(checkpoints: Path | str, spec: JobSpec, *, base: str, best: bool = True) -> dict[str, bytes]:
    """Returns the adapter as PEFT's files, by name.

    Args:
        base: the base's name in the API.
        best: export the job's result, with the weights that `spec.keep` names. If False, export the last checkpoint,
            also of a job that is still in training.

    Raises:
        ArtifactMissing: the job has no checkpoint, or `best` is true and the job has not finished.
        ArtifactCorrupt: a checkpoint can't be read.
    """
    data = load_checkpoint_to_export(checkpoints, spec, best=best)
    return adapter_files(spec, data.weights, data.state, base)


def load_checkpoint_to_export(checkpoints: Path | str, spec: JobSpec, *, best: bool = True) -> CheckpointData:
    """Loads the checkpoint that `export_adapter` exports.

    Raises:
        ArtifactMissing, ArtifactCorrupt: as `export_adapter`.
    """
    last = checkpoint.latest(checkpoints, spec)
    if last is None or (best and not last.run_state.finished):
        raise ArtifactMissing(
            f"{checkpoints} holds no complete checkpoint of {'the end of ' if best else ''}this job, which is step "
            f"{spec.steps} or an early stop: train to the end first."
        )
    return checkpoint.best(checkpoints, spec, last) if best and spec.keep == "best" else last
