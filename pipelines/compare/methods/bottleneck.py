"""Bottleneck adapters (Houlsby et al. 2019, 1902.00751, section 2.1): small residual networks behind each sublayer.

`y = h + U gelu(D h + d) + u` after a layer's attention and after its MLP, before either is added to the stream. U and
u begin at zero, so that training begins from the base itself. (Pfeiffer et al. 2021 keep those after the MLP alone.)
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

#: The last linears of a layer's two sublayers, as the Llama family calls them.
SUBLAYERS = ("o_proj", "down_proj")


class Bottleneck(nn.Module):
    """One adapter in fp32: [..., width] to the same, through `size` inner units."""

    def __init__(self, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device)
        self.up = nn.Linear(size, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sublayer's output with the adapter's own added, in its dtype."""
        added: torch.Tensor = self.up(gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)

    def hook(self, place: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        """`forward` as a hook behind the linear at its place."""
        return self.forward(output)


@contextmanager
def attach_bottleneck(model: PreTrainedModel, size: int, seed: int) -> Iterator[AdaptedModel]:
    """`model` with fresh adapters of `size` inner units, a function of the seed; afterwards as it was before.

    Raises:
        AdapterInvalid: the base's layers aren't called as the Llama family's.
    """
    places = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in SUBLAYERS}
    if not places:
        raise AdapterInvalid(
            f"The base ({type(model).__name__}) has no linears called {' or '.join(SUBLAYERS)}, behind which "
            "bottleneck adapters stand: leave bottleneck out.",
            param="methods",
        )
    with seeded(model.device, seed, "layers"):
        adapters = {name: Bottleneck(place.out_features, size, model.device) for name, place in places.items()}
    hooks = [place.register_forward_hook(adapters[name].hook) for name, place in places.items()]
    weights = {
        f"{name}.{key}": value for name, adapter in adapters.items() for key, value in adapter.named_parameters()
    }
    try:
        yield AdaptedModel(model=model, weights=dict(sorted(weights.items())), set_dropout=lambda on: None)
    finally:
        for hook in hooks:
            hook.remove()
