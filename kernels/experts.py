"""A mixture of experts: each row goes through the few MLPs that a router chooses for it.

Rows are sorted by expert on their device, and all experts of a layer compute in one operation of the backend. Nothing
here reads a tensor's values on the host, so that a step can be captured into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loramill.kernels.backend import Activation, Backend, Weight


@dataclass(frozen=True, slots=True)
class Experts:
    """The frozen experts of a layer, to which no adapter applies.

    Attributes:
        router: [experts, d].
        gate_up: Packed by `Backend.pack_experts` from [experts, 2 inner, d].
        down: Packed likewise from [experts, d, inner].
        top_k: Number of experts per row.
        normalized: Whether the weights of a row's experts are divided by their sum.
    """

    router: Weight
    gate_up: Weight
    down: Weight
    top_k: int
    normalized: bool


def run_experts(ops: Backend, experts: Experts, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The weighted sum of the outputs of each row's experts (Shazeer et al. 2017, section 2).

    Args:
        ops: The backend that packed the weights.
        experts: The experts.
        x: [rows, d].
        activation: The activation of the gates.

    Returns:
        [rows, d].
    """
    shares, chosen = _route(ops, experts, x)
    owners, order = chosen.flatten().sort(stable=True)
    # For each expert, the end of its rows.
    ends = torch.searchsorted(owners, torch.arange(experts.router.d_out, device=x.device), right=True).int()
    inner = ops.grouped_linear(x[order // experts.top_k], experts.gate_up, ends)
    sorted_out = ops.grouped_linear(ops.gated_activation(inner, activation), experts.down, ends)
    out = torch.empty_like(sorted_out)
    out[order] = sorted_out
    # A batched product adds a row's experts in one order; additions in place by a GPU would not.
    return torch.bmm(shares[:, None], out.view(len(x), experts.top_k, out.shape[1]))[:, 0]


def _route(ops: Backend, experts: Experts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of each row's experts, of x's dtype, and their indices: [rows, top_k] each."""
    chances = ops.linear(x, experts.router).float().softmax(-1)
    shares, chosen = chances.topk(experts.top_k, dim=-1)
    if experts.normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    return shares.to(x.dtype), chosen
