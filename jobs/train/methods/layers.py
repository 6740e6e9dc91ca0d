"""Linears of a base with an adapter: what takes a linear's place while a job trains.

Parameters are fp32; they compute in the base's dtype, as under autocast, which on a CPU in bf16 takes a seventh off a
step of PEFT's own layers. Kept in memory for the backward pass is x alone, once, in its own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loramill.jobs.train.methods.targets import TargetModule
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.training import Frozen, Trainable, grouped_lora

#: There is one adapter in training, and all rows are its own.
_SLOT = Slot(0, 0)

#: Rows of a weight that are merged at once where only their norms are wanted.
_NORM_CHUNK_ROWS = 256


class LoraLinear(nn.Module):
    """y = W x + scale B A x (Hu et al. 2021, 2106.09685, equation 3).

    Attributes:
        linear: the base's own, frozen.
        a, b: [r, d_in] and [d_out, r], fp32.
        dropping: whether x is thinned by `dropout` on its way into the adapter; the masks follow from torch's global
            CPU generator, so that a recomputed forward pass has the same.
    """

    linear: nn.Linear | Conv1D

    def __init__(self, target: TargetModule, a: torch.Tensor, b: torch.Tensor, dropout: float) -> None:
        super().__init__()
        self.linear = target.linear
        self.frozen = dense_weight(target.linear)
        self.scale, self.dropout, self.dropout_enabled = target.scale, dropout, False
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters under the ends of their names in PEFT's files."""
        return {"lora_A.weight": self.a, "lora_B.weight": self.b}

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What else a checkpoint has to hold, under the ends of its names there."""
        return {}

    def invalidate_cache(self) -> None:
        """Drops what was worked out of the weights: to be called after an optimizer's step.

        Torch's fused optimizers leave no trace in the weights' versions, by which it could be known.
        """

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices that x meets: A and B."""
        return self.a, self.b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] to [..., d_out], in x's dtype."""
        return self._adapted(x, _detached(self.linear.bias))

    def _adapted(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = self.factors()
        dropout = self.dropout if self.dropout_enabled else 0.0
        seed = int(torch.randint(2**62, ())) if dropout else 0
        adapter = Trainable(a.to(x.dtype), b.to(x.dtype), self.scale, dropout, seed)
        y = grouped_lora(rows, self.frozen, {_SLOT: adapter}, _single_adapter_batch(len(rows)), bias)
        return y.view(*x.shape[:-1], -1)


class DoraLinear(LoraLinear):
    """y = m / |W + scale B A| (W x + scale B A x), the norm a row's (Liu et al. 2024, 2402.09353, equation 5).

    The norm is taken for a constant in the backward pass (section 4.3), and worked out once a step.
    """

    def __init__(self, target: TargetModule, a: torch.Tensor, b: torch.Tensor, dropout: float) -> None:
        super().__init__(target, a, b, dropout)
        self._row_norms: tuple[tuple[int, int], torch.Tensor] | None = None
        self.magnitude = nn.Parameter(self.row_norms().clone())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """With the magnitudes."""
        return {**super().trained_parameters(), "lora_magnitude_vector": self.magnitude}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] to [..., d_out], in x's dtype."""
        # In fp32: rounded to bf16, a gain would shift all that a row ever gives.
        y = (self._adapted(x, None) * (self.magnitude / self.row_norms())).to(x.dtype)
        bias = _detached(self.linear.bias)
        return y if bias is None else y + bias

    def invalidate_cache(self) -> None:
        """Drops the norms."""
        self._row_norms = None

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """The norms of the rows of the merged weight, [d_out]."""
        versions = self.a._version, self.b._version
        if self._row_norms is None or self._row_norms[0] != versions:
            weight = self.frozen if isinstance(self.frozen, torch.Tensor) else self.frozen()
            # Some rows at a time: whole merged weights in fp32, made and dropped once a step, tear the heap.
            parts = zip(torch.split(weight, _NORM_CHUNK_ROWS), torch.split(self.b, _NORM_CHUNK_ROWS), strict=True)
            norms = [torch.addmm(w.float(), b, self.a, alpha=self.scale).norm(dim=1) for w, b in parts]
            self._row_norms = versions, torch.cat(norms)
        return self._row_norms[1]


def dense_weight(linear: nn.Linear | Conv1D) -> Frozen:
    """A linear's weight [d_out, d_in]; of bitsandbytes' Linear4bit, what makes it."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return partial(dequantize_4bit, weight.data, state)
    return weight.detach().T if isinstance(linear, Conv1D) else weight.detach()


@contextmanager
def insert_layers(model: nn.Module, layers: Mapping[str, LoraLinear], targets: list[TargetModule]) -> Iterator[None]:
    """`model` with `layers` in their places, by name, and nothing of its own trained; afterwards as it was before."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for place in targets:
            setattr(place.parent, _child_name(place), layers[place.name])
        yield
    finally:
        for place in targets:
            setattr(place.parent, _child_name(place), place.linear)
        for parameter in learning:
            parameter.requires_grad_(True)


def _child_name(target: TargetModule) -> str:
    return target.name.rpartition(".")[2]


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


@lru_cache(maxsize=64)
def _single_adapter_batch(rows: int) -> Batch:
    return Batch.of([(_SLOT, rows)])
