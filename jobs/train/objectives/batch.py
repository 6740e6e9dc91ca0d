"""The loss of one batch, which is computed in several passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from loramill.data.encoding import EncodedExample
from loramill.jobs.train.batching import sequences, supervised_weight
from loramill.jobs.train.forward import Predictions


class BatchLoss(Protocol):
    """The loss of a batch as a sum over its passes."""

    @property
    def units(self) -> Sequence[Sequence[EncodedExample]]:
        """Sequences of which those of one unit are in one pass."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of what the passes add up; the first two are "loss" and "accuracy"."""
        ...

    def of_pass(self, unit_indices: Sequence[int], predictions: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what a pass adds to the loss, with a gradient, and its part of `names`, float [len(names)].

        Args:
            unit_indices: of the pass, in the order of its rows.
            predictions: of its supervised tokens.
        """
        ...


class SupervisedLoss:
    """The weighted mean cross-entropy of the supervised tokens, in nats; the accuracy is weighted, too."""

    names = ("loss", "accuracy")

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self.units = [(sequence,) for sequence in sequences(examples)]
        self._total_weight = math.fsum(supervised_weight(sequence) for (sequence,) in self.units)

    def of_pass(self, unit_indices: Sequence[int], predictions: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BatchLoss.of_pass`."""
        loss, correct = predictions.cross_entropy(self._total_weight)
        return loss, torch.stack([loss.detach(), correct])
