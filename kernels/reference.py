"""The specification: batched LoRA in float32, run by run, in plain torch."""

from __future__ import annotations

import torch

from loramill.kernels.batch import Batch
from loramill.kernels.slab import SiteSlab


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Adds to y, in place, what each run's adapter makes of x; see `loramill.kernels.lora` for the contract."""
    for run in batch.runs:
        weights = slab.weights(run.slot)
        if weights is None:
            continue
        rows = y[run.rows]
        shrunk = x[run.rows].float() @ weights.a
        for module in weights.modules:
            target = rows[:, module.columns]
            total = torch.addmm(target.float(), shrunk[:, module.ranks], module.b)
            if module.gain is not None:
                total *= module.gain
            target.copy_(total)
