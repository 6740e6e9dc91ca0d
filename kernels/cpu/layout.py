"""How the native kernels want matrices to lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loramill.kernels.adapter import Layout

#: Outputs that lie side by side: two 512-bit registers of floats.
OUTPUTS = 32
#: Ranks of `a` that lie side by side.
RANKS = 4


def panels(weight: torch.Tensor) -> torch.Tensor:
    """Weight [d_out, d_in] as [ceil(d_out / 32), ceil(d_in / p), 32, p], padded with zeros; p is 1 in float32, else 2.

    The kernels read it from end to end: a step along the inputs takes p inputs of 32 outputs, two cache lines or, in
    int8, one.
    """
    pair = _lane(weight)
    d_out, d_in = weight.shape
    padded = F.pad(weight, (0, -d_in % pair, 0, -d_out % OUTPUTS))
    return padded.view(-1, OUTPUTS, padded.shape[1] // pair, pair).transpose(1, 2).contiguous()


def quads(a: torch.Tensor) -> torch.Tensor:
    """Matrix a [r, d_in] as [ceil(r / 4), ceil(d_in / n), 4, n], padded with zeros; n is 16 in float32, else 32.

    Read from end to end like `panels`: a step along the inputs takes n of them for each of four ranks.
    """
    line = 16 * _lane(a)
    padded = F.pad(a, (0, -a.shape[1] % line, 0, -a.shape[0] % RANKS))
    return padded.view(-1, RANKS, padded.shape[1] // line, line).transpose(1, 2).contiguous()


def _lane(matrix: torch.Tensor) -> int:
    """Inputs that a 32-bit lane of the kernels' registers holds; int8 is widened to bfloat16."""
    return 1 if matrix.dtype == torch.float32 else 2


PANELS = Layout(a=quads, b=panels)
