"""The inputs of a training run, and the progress that it reports after each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from loramill.data.encoding import TrainingExample
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup
from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.types import JobSpec


def never_stop() -> None:
    """The default of `raise_if_stopped`: does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """A job's spec and data, and everything around them that training uses.

    Attributes:
        train_examples, valid_examples: of the kind that the spec's objective needs. Without validation examples nothing
            is validated, and nothing stops early.
        base_folder: the base's files.
        checkpoints: folder or fsspec URL of this job alone.
        start_from: PEFT folder whose weights training starts from, of the same rank, targets and scale.
        raise_if_stopped: called before every forward pass. Its error ends the training at once; JobPaused and
            JobPreempted first save a checkpoint of the last complete step.
        micro_tokens: replaces the spec's after memory ran out; the result is the same to rounding.
        process_group: processes that share each step's passes. Each of them trains with the same context, and gets the
            same progress.
        attach: attaches what is trained to the model; by default the adapter of the spec's method.
        deterministic: compute the same bits each time on a GPU, too.
        validated_steps: steps after which the job is validated in addition to those of its spec. These validations can
            set the best loss, but do not count toward `patience`.
    """

    spec: JobSpec
    train_examples: Sequence[TrainingExample]
    valid_examples: Sequence[TrainingExample] = ()
    base_folder: Path
    checkpoints: Path | str
    start_from: Path | None = None
    raise_if_stopped: Callable[[], None] = never_stop
    micro_tokens: int | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    attach: Callable[[PreTrainedModel, JobSpec, Path], AbstractContextManager[AdaptedModel]] = attach_adapter
    deterministic: bool = False
    validated_steps: Collection[int] = ()

    @property
    def pass_tokens(self) -> int:
        """About how many tokens one forward pass takes."""
        return self.micro_tokens or self.spec.micro_tokens


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """The progress after an optimizer step.

    Attributes:
        step: 1 to `total_steps`; an early stop ends before.
        loss: the objective's loss of the step's examples, before its update; of answers, the weighted mean
            cross-entropy of their supervised tokens in nats.
        accuracy: weighted share of the supervised tokens that the model predicts as the most likely.
        grad_norm: before clipping.
        trained_tokens: tokens trained on so far, prompts included.
        valid_loss, valid_accuracy: the same over the validation examples, after the update; None if the step has no
            validation.
        is_best: whether this is the lowest validation loss so far.
        rewards: preference tuning: `losses.METRICS` of the step, and of its validation with the prefix "valid_".
    """

    step: int
    total_steps: int
    loss: float
    accuracy: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    is_best: bool = False
    rewards: Mapping[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics under OpenAI's names for a checkpoint's metrics."""
        metrics = {"step": self.step, "train_loss": self.loss, "train_mean_token_accuracy": self.accuracy}
        if self.valid_loss is not None and self.valid_accuracy is not None:
            for name in ("valid", "full_valid"):  # a validation always covers the whole file
                metrics |= {f"{name}_loss": self.valid_loss, f"{name}_mean_token_accuracy": self.valid_accuracy}
        return {**metrics, **self.rewards}
