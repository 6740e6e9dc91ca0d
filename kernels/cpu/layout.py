"""How the native kernels want matrices to lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loramill.kernels.adapter import Layout
from loramill.kernels.memory import ALIGNMENT

#: Outputs of a panel: floats of one 512-bit register.
LANES = 16


def panels(weight: torch.Tensor) -> torch.Tensor:
    """Weight [d_out, d_in] as [ceil(d_out / 16), ceil(d_in / p), 16, p], padded with zeros; p is 2 in bfloat16, else 1.

    A step along the inputs reads one cache line that holds p inputs of 16 outputs.
    """
    pair = 4 // weight.element_size()
    d_out, d_in = weight.shape
    padded = F.pad(weight, (0, -d_in % pair, 0, -d_out % LANES))
    return padded.view(-1, LANES, padded.shape[1] // pair, pair).transpose(1, 2).contiguous()


def whole_lines(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, d], each padded with zeros to whole cache lines."""
    line = ALIGNMENT // rows.element_size()
    return F.pad(rows, (0, -rows.shape[1] % line)).contiguous()


PANELS = Layout(a=whole_lines, b=panels)
