"""How a step's gradient changes what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from loramill.jobs.train.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """Trained weights with AdamW's two moments, under the same names; what a job goes on from."""

    weights: dict[str, torch.Tensor]
    first_moments: dict[str, torch.Tensor]
    second_moments: dict[str, torch.Tensor]


class Optimizer(Protocol):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), on one device or spread over several and the host.

    Attributes:
        together: with several processes, each backward pass, and `masters`, is done by all of them at once.
    """

    collective: bool

    def load_state(self, step: int, state: OptimizerState | None) -> None:
        """Goes on after `step` steps, where `masters` were taken; None: from the weights as they are, at step 0."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of a part of the step's loss; `last` says that the step has no more parts."""

    def step(self, learning_rate: float) -> float:
        """Takes the step, unless the gradient isn't finite; returns the gradient's norm before clipping.

        Args:
            rate: the learning rate, before each weight's own factor.
        """

    def zero_grad(self) -> None:
        """Forgets the step's gradient, which until then is the parameters' own where `together` isn't."""

    def state(self) -> OptimizerState:
        """What `begin` takes."""


class AdamW:
    """torch's, on weights that lie where the model computes; the processes' gradients are summed.

    Args:
        factors: of the learning rate, by name; 1 where there is none.
        max_norm: of the gradient; a longer one is shortened.
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
        """As `Update` says."""
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
        """As `Update` says."""
        torch.autograd.backward(loss)

    def step(self, learning_rate: float) -> float:
        """As `Update` says."""
        self._process_group.add_gradients(self._weights.values())
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), self._max_norm).item()
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate * group["factor"]
            self._optimizer.step()
        return norm

    def zero_grad(self) -> None:
        """As `Update` says."""
        self._optimizer.zero_grad()

    def state(self) -> OptimizerState:
        """As `Update` says; the tensors are those in use."""
        state = {name: self._optimizer.state[parameter] for name, parameter in self._weights.items()}
        return OptimizerState(
            {name: parameter.detach() for name, parameter in self._weights.items()},
            {name: each["exp_avg"] for name, each in state.items()},
            {name: each["exp_avg_sq"] for name, each in state.items()},
        )
