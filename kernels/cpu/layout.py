"""How the native kernels want matrices to lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loramill.kernels.adapter import Layout
from loramill.kernels.memory import ALIGNMENT

#: Outputs that lie side by side: two 512-bit registers of floats.
OUTPUTS = 32
#: Ranks of `a` that lie side by side.
RANKS = 4


def panels(weight: torch.Tensor) -> torch.Tensor:
    """Weight [d_out, d_in] as [ceil(d_out / 32), ceil(d_in / p), 32, p], padded with zeros; p is 2 in bfloat16, else 1.

    The kernels read it from end to end: a step along the inputs takes two cache lines, p inputs of 32 outputs.
    """
    pair = 4 // weight.element_size()
    d_out, d_in = weight.shape
    padded = F.pad(weight, (0, -d_in % pair, 0, -d_out % OUTPUTS))
    return padded.view(-1, OUTPUTS, padded.shape[1] // pair, pair).transpose(1, 2).contiguous()


def quads(a: torch.Tensor) -> torch.Tensor:
    """Matrix a [r, d_in] as [ceil(r / 4), lines of d_in, 4, elements of a cache line], padded with zeros.

    Read from end to end like `panels`: a step along the inputs takes a cache line of each of four ranks.
    """
    line = ALIGNMENT // a.element_size()
    padded = F.pad(a, (0, -a.shape[1] % line, 0, -a.shape[0] % RANKS))
    return padded.view(-1, RANKS, padded.shape[1] // line, line).transpose(1, 2).contiguous()


PANELS = Layout(a=quads, b=panels)
