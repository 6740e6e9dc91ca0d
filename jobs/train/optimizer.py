"""Optimizers: AdamW in torch, and the interface that DeepSpeed's has, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from loramill.jobs.train.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The trained weights and AdamW's two moments, under the same names; a job resumes from them."""

    weights: dict[str, torch.Tensor]
    first_moments: dict[str, torch.Tensor]
    second_moments: dict[str, torch.Tensor]


class Optimizer(Protocol):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), on one device or spread over several and the host.

    Attributes:
        collective: all processes must call `backward` and `state` together.
    """

    collective: bool

    def load_state(self, step: int, state: OptimizerState | None) -> None:
        """Resumes after `step` steps with the state of that step, or starts with the current weights if it is None."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of a part of the step's loss; `last` marks the last part of the step."""

    def step(self, learning_rate: float) -> float:
        """Updates the weights, unless the gradient is not finite; returns the gradient's norm before clipping.

        Args:
            learning_rate: before each weight's own factor.
        """

    def zero_grad(self) -> None:
        """Clears the gradients. Until then the parameters have them as `grad`, unless the optimizer is collective."""

    def state(self) -> OptimizerState:
        """Returns the state that `load_state` takes."""


class AdamW:
    """torch's AdamW, on weights where the model computes; the gradients of all processes are summed.

    Args:
        lr_factors: factors of the learning rate, by name of the weight; 1 by default.
        max_norm: to which the gradient is clipped.
    """

    collective = False

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        lr_factors: Mapping[str, float],
        *,
        weight_decay: float,
        max_norm: float,
        process_group: ProcessGroup,
    ) -> None:
        self._weights, self._max_norm, self._process_group = weights, max_norm, process_group
        groups = [
            {
                "params": [each for name, each in weights.items() if lr_factors.get(name, 1.0) == factor],
                "factor": factor,
            }
            for factor in sorted({lr_factors.get(name, 1.0) for name in weights})
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def load_state(self, step: int, state: OptimizerState | None) -> None:
        for name, parameter in self._weights.items():
            first = second = torch.zeros_like(parameter)
            if state is not None:
                parameter.copy_(state.weights[name])
                first, second = state.first_moments[name], state.second_moments[name]
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": first.to(parameter.device, copy=True),
                "exp_avg_sq": second.to(parameter.device, copy=True),
            }

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def step(self, learning_rate: float) -> float:
        self._process_group.add_gradients(self._weights.values())
        norm = get_total_norm([each.grad for each in self._weights.values() if each.grad is not None])
        if norm + 1e-6 > self._max_norm:  # as torch's clipping, which would multiply by 1
            clip_grads_with_norm_(self._weights.values(), self._max_norm, norm)
        if norm.isfinite():
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate * group["factor"]
            self._optimizer.step()
        return norm.item()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state(self) -> OptimizerState:
        """Returns the tensors in use, not copies."""
        state = {name: self._optimizer.state[parameter] for name, parameter in self._weights.items()}
        return OptimizerState(
            {name: parameter.detach() for name, parameter in self._weights.items()},
            {name: each["exp_avg"] for name, each in state.items()},
            {name: each["exp_avg_sq"] for name, each in state.items()},
        )
