"""Batched multi-LoRA operations: one contract, a backend for each kind of machine. Floor 0; never imports Ray."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from loramill.errors import SettingsInvalid
from loramill.kernels import reference
from loramill.kernels.adapter import Delta, PackedAdapter, Site, pack
from loramill.kernels.batch import Batch, Run, Slot
from loramill.kernels.slab import SiteSlab, Slab

__all__ = [
    "BACKENDS",
    "Batch",
    "Delta",
    "PackedAdapter",
    "Run",
    "Site",
    "SiteSlab",
    "Slab",
    "Slot",
    "backend",
    "lora",
    "pack",
]

#: The backends of this installation, the default first.
BACKENDS: dict[str, Callable[[torch.Tensor, torch.Tensor, SiteSlab, Batch], None]] = {"reference": reference.lora}


@functools.cache
def backend() -> str:
    """The backend that `lora` runs on: the best there is, or what `LORAMILL_KERNELS` says.

    Raises:
        SettingsInvalid: the variable names a backend that isn't here.
    """
    name = os.environ.get("LORAMILL_KERNELS") or next(iter(BACKENDS))
    if name not in BACKENDS:
        raise SettingsInvalid(f"LORAMILL_KERNELS={name} is no backend of this installation; use {', '.join(BACKENDS)}.")
    return name


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Adds to y, in place, what each run's adapter makes of x.

    For every run of `batch` and every target module of its adapter at this site, with a [r, d_in], b [d_out, r]
    (scale folded in) and gain [d_out] (1 without DoRA), in float32:

        y[rows, columns] = gain * (y[rows, columns] + x[rows] @ a.T @ b.T)

    Rows without an adapter, and columns of modules that an adapter doesn't target, stay as they are bit for bit.
    y is the base's output before any bias (DoRA's gain scales the weights alone).

    Args:
        x: [rows, d_in], bfloat16 or float32.
        y: [rows, sum of the site's widths], of x's dtype; may be a view.
        slab: this site of the slab.
        batch: whose rows are whose.

    Raises:
        EngineFault: a run's slot was freed since.
    """
    if batch.runs:
        BACKENDS[backend()](x, y, slab, batch)
