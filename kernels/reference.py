"""The specification: every operation in float32 and in the plainest torch, run by run and sequence by sequence."""

from __future__ import annotations

import torch

from loramill.kernels.adapter import ROWS
from loramill.kernels.batch import Batch
from loramill.kernels.slab import SiteSlab

name = "reference"
layout = ROWS


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Adds each run's adapter; the contract is that of `loramill.kernels.lora`."""
    slab.slab.check(batch)
    for run in batch.runs:
        column = 0
        for module, width in enumerate(slab.site.widths):
            delta = slab.rows(run.slot.index, module)
            if delta is not None:
                target = y[run.rows, column : column + width]
                total = target.float() + x[run.rows].float() @ delta.a.float().T @ delta.b.float().T
                target.copy_(total if delta.gain is None else delta.gain * total)
            column += width
