"""The interface between a method of fine-tuning and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from loramill.jobs.train.methods.layers import PassRows
from loramill.jobs.train.optimizer import Optimizer
from loramill.kernels.batch import Slot


def no_penalty() -> torch.Tensor | None:
    """The penalty of a method that adds nothing to the loss."""
    return None


def nothing_derived() -> Mapping[str, torch.Tensor]:
    """The `derived` of a method whose files contain only what was trained."""
    return {}


def do_nothing(step: int) -> None:
    """The `after_step` of a method that has nothing to do."""


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """A base with the parameters that a job trains on it.

    Attributes:
        model: called like the base.
        weights: the trained parameters, sorted by name; checkpoints and exported files contain these.
        set_dropout: turns the adapter's dropout on, with the key from which its masks follow, or off (None); the base's
            dropout stays off, as in serving.
        lr_factors: factors of the learning rate, by name of the weight; 1 by default (LoRA+).
        state: other tensors that training changes in place and a checkpoint has to hold (AdaLoRA's importances).
        derived: returns tensors of the adapter's files that are computed from the weights and the base (DoRA's gains);
            a checkpoint contains them with the state, since the files are written without the base.
        penalty: returns what is added to a step's mean loss, with a gradient, or None (AdaLoRA's orthogonality).
        optimizer: None for AdamW on the model's device.
        after_step: called with the number of steps done, after each optimizer step and before gradients are cleared
            (AdaLoRA prunes; layers drop what they computed from the weights).
        needs_mask: whether the model has to be given an attention mask, which it changes (prefix tuning).
        best_from_step: the first step whose weights may be the best and end the job early (AdaLoRA has pruned its ranks
            by then).
        slot, rows: the adapter's slot, and which adapters the rows of the next pass belong to; None if the model is not
            the base, which then computes for this job alone.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    set_dropout: Callable[[int | None], None]
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    derived: Callable[[], Mapping[str, torch.Tensor]] = nothing_derived
    penalty: Callable[[], torch.Tensor | None] = no_penalty
    optimizer: Optimizer | None = None
    after_step: Callable[[int], None] = do_nothing
    best_from_step: int = 0
    needs_mask: bool = False
    slot: Slot | None = None
    rows: PassRows | None = None
