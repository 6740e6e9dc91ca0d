"""Adapters on embeddings in plain torch, for CPUs: each row reads only r numbers of a."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from loramill.kernels.adapters.packing import RANK, scales_offset
from loramill.kernels.adapters.slab import SiteSlab
from loramill.kernels.batch import Batch, Run


def adapt_embedding(
    tokens: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch, scale: float | torch.Tensor = 1.0
) -> None:
    """Applies each run's adapter of an embedding to y in place.

    For every run whose adapter targets this site, with a [r, vocabulary] and b [d, r], and sums in float32:

        y[rows] += scale * (a.T[tokens[rows]] @ b.T)

    Rows of other runs are unchanged bit for bit, and a row's bits do not depend on the other rows.

    Args:
        tokens: int64 [rows].
        y: [rows, d].
        slab: The embedding's site of a slab.
        batch: The adapter of each row.
        scale: Factor of the base's embedding, as in the Gemma family.

    Raises:
        EngineFault: A run's slot has been freed.
    """
    slab.slab.check(batch)
    dtype, width = slab.slab.dtype, slab.columns
    for run in batch.runs:
        a, b, _, rank = slab.table[run.slot.index, 0].tolist()
        if not rank:
            continue
        shrunk = slab.tensor(a, (slab.site.d_in, rank), dtype)[tokens[run.rows]].float()
        if dtype == torch.int8:
            shrunk *= slab.tensor(scales_offset(a, rank), (rank,), torch.float32)
        expand = slab.tensor(b, (rank, width), dtype).float()
        delta = torch.zeros(len(shrunk), width, device=y.device)
        # Rank by rank: the order of sums in a matrix product depends on the number of rows.
        for column, row in zip(shrunk.T, expand, strict=True):
            delta.addcmul_(column[:, None], row)
        y[run.rows] = (y[run.rows].float() + delta * scale).to(y.dtype)


def batch_of_rows(batch: Batch, rows: Sequence[int], slab: SiteSlab) -> Batch:
    """The batch of some of a batch's rows, in ascending order, with only the runs whose adapters target this site."""
    targeted = slab.table[batch.segments[:, 0], :, RANK].any(axis=1)
    runs = []
    for index in np.flatnonzero(targeted):
        run = batch.runs[index]
        part = slice(bisect_left(rows, run.rows.start), bisect_left(rows, run.rows.stop))
        if part.start < part.stop:
            runs.append(Run(run.slot, part))
    return Batch(len(rows), tuple(runs))
