"""The modules of a loaded base that a job adapts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramill.models.targets import find_targets, rank_of, scale_of
from loramill.types import JobSpec


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear that a job adapts.

    Attributes:
        name: its path in the base.
        linear: torch's or bitsandbytes' linear, or GPT-2's Conv1D.
        rank, scale: of its adapter.
    """

    name: str
    linear: nn.Linear | Conv1D
    rank: int
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """The linear's d_out and d_in."""
        if isinstance(self.linear, Conv1D):
            d_in, d_out = self.linear.weight.shape
            return d_out, d_in
        return self.linear.out_features, self.linear.in_features

    @property
    def device(self) -> torch.device:
        """The linear's device."""
        return self.linear.weight.device


def find_target_modules(model: PreTrainedModel, spec: JobSpec) -> list[TargetModule]:
    """Returns the linears that `spec` adapts, in the base's order.

    Raises:
        InvalidRequest: as `loramill.models.targets.find_targets`.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    names = find_targets(spec, list(linears), next((name for name, each in linears.items() if each is head), None))
    return [TargetModule(name, linears[name], rank_of(spec, name), scale_of(spec, name)) for name in names]
