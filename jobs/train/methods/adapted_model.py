"""The face that every method of fine-tuning shows to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from loramill.jobs.train.optimizer import Optimizer


def no_penalty() -> torch.Tensor | None:
    """A method that adds nothing to the loss."""
    return None


def do_nothing(step: int) -> None:
    """A method with nothing to do after a step."""


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """A base with what a job trains on it.

    Attributes:
        model: called as the base is.
        weights: the trained parameters, sorted by name; a checkpoint and the exported files are made of these.
        set_dropout: turns the adapter's own dropout on or off; the base's stays off, as it was served so.
        rates: factors of the learning rate, by name; 1 where there is none (LoRA+).
        state: other tensors that training changes, in place, and that a checkpoint has to hold (AdaLoRA's importances).
        penalty: what is added to a step's mean loss, with a gradient; None: nothing (AdaLoRA's orthogonality).
        update: what changes the weights; None: AdamW where the model is.
        after_step: called with the number of steps done, after each optimizer step and before gradients are cleared
            (AdaLoRA prunes; DoRA's norms are out of date).
        settled: the first step whose weights may be the best and end the job early (AdaLoRA's ranks are pruned then).
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    set_dropout: Callable[[bool], None]
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    penalty: Callable[[], torch.Tensor | None] = no_penalty
    optimizer: Optimizer | None = None
    after_step: Callable[[int], None] = do_nothing
    best_from_step: int = 0
