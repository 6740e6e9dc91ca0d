"""Host side of adapters on embeddings on a GPU: one launch for all runs and ranks of a step."""

from __future__ import annotations

import numpy as np
import torch
import triton

from loramill.errors import EngineFault
from loramill.kernels.adapters.packing import RANK, A, B
from loramill.kernels.adapters.slab import SiteSlab
from loramill.kernels.batch import Batch
from loramill.kernels.memory import ALIGNMENT, to_device
from loramill.kernels.triton.kernels import embed_row
from loramill.kernels.triton.lora import resident_slab
from loramill.kernels.triton.plans import EMBED


def adapt_embedding(tokens: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch, scale: float = 1.0) -> None:
    """Applies each run's adapter of an embedding; see `loramill.kernels.adapters.embedding.adapt_embedding`.

    Nothing is launched or copied if no adapter of the step targets the embedding.

    Raises:
        EngineFault: A run's slot has been freed, or tokens or y have another shape or dtype.
    """
    slab.slab.check(batch)
    segments = batch.segments
    targets = slab.table[segments[:, 0], 0]
    is_target = targets[:, RANK] > 0
    if not is_target.any():
        return
    fits = tokens.dtype == torch.int64 and tokens.shape == (batch.rows,) and y.is_floating_point()
    if not fits or y.shape != (batch.rows, slab.columns) or y.stride(1) != 1:
        raise EngineFault(
            f"Tokens are {tokens.dtype} {list(tokens.shape)} and y is {y.dtype} {list(y.shape)} with strides "
            f"{y.stride()}; they must be int64 {[batch.rows]} and floating {[batch.rows, slab.columns]} with "
            "contiguous rows."
        )
    segments, targets = segments[is_target], targets[is_target]
    site = resident_slab(slab.slab).sites[slab.index]
    starts = targets[:, [A, B]] // site.weights.itemsize
    rows = np.concatenate([np.arange(start, stop) for _, start, stop in segments.tolist()])
    of_runs = np.repeat(np.column_stack([starts, targets[:, RANK]]), segments[:, 2] - segments[:, 1], axis=0)
    table = to_device(np.column_stack([rows, of_runs]), y.device)
    embed_row[len(table), triton.cdiv(slab.columns, EMBED.constants["WIDTH"])](
        y, site.weights, site.gains, tokens, table, float(scale), slab.columns, y.stride(0),
        ALIGN=ALIGNMENT // site.weights.itemsize, **EMBED.constants, **EMBED.options,
    )  # fmt: skip
