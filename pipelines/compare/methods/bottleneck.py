"""Bottleneck adapters (Houlsby et al. 2019, 1902.00751, section 2.1): small residual networks after each sublayer.

`y = h + U gelu(D h + d) + u` after a layer's attention and after its MLP, before either is added to the stream. U and
u are initialized to zero, so that training starts at the base. (Pfeiffer et al. 2021 keep only those after the MLP.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from loramill.errors import AdapterInvalid
from loramill.jobs.train.methods import AdaptedModel
from loramill.jobs.train.methods.seeds import seeded

#: The last linears of a layer's two sublayers, by their names in the Llama family.
SUBLAYERS = ("o_proj", "down_proj")


class Bottleneck(nn.Module):
    """One adapter in fp32, from [..., width] to the same shape through `size` inner units."""

    def __init__(self, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device)
        self.up = nn.Linear(size, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adds the adapter's output to the sublayer's, in the sublayer's dtype."""
        added: torch.Tensor = self.up(gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)

    def hook(self, linear: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        """`forward` as a forward hook of the linear."""
        return self.forward(output)


@contextmanager
def attach_bottleneck(model: PreTrainedModel, size: int, seed: int) -> Iterator[AdaptedModel]:
    """Attaches new adapters of `size` inner units, initialized by the seed; the context's end removes them.

    Raises:
        AdapterInvalid: the base's layers do not have the Llama family's names.
    """
    linears = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in SUBLAYERS}
    if not linears:
        raise AdapterInvalid(
            f"The base ({type(model).__name__}) has no linears named {' or '.join(SUBLAYERS)}, after which "
            "bottleneck adapters are inserted: omit bottleneck.",
            param="methods",
        )
    with seeded(model.device, seed, "layers"):
        adapters = {name: Bottleneck(linear.out_features, size, model.device) for name, linear in linears.items()}
    hooks = [linear.register_forward_hook(adapters[name].hook) for name, linear in linears.items()]
    weights = {
        f"{name}.{key}": value for name, adapter in adapters.items() for key, value in adapter.named_parameters()
    }
    try:
        yield AdaptedModel(model=model, weights=dict(sorted(weights.items())), set_dropout=lambda on: None)
    finally:
        for hook in hooks:
            hook.remove()
