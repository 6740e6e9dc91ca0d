"""Batched multi-LoRA operations: one contract, with a backend per kind of machine. Never imports Ray."""

from __future__ import annotations

import functools
import logging
import os

import torch

from loramill.errors import SettingsInvalid, SetupError
from loramill.kernels.adapters.packing import Delta, PackedAdapter, Site
from loramill.kernels.adapters.slab import SiteSlab, Slab
from loramill.kernels.backend import Backend, LayerKV, Quantized, Weight
from loramill.kernels.batch import Batch, Run, Slot
from loramill.kernels.paging import KVSpan, Pages

__all__ = [
    "BACKENDS",
    "Backend",
    "Batch",
    "Delta",
    "KVSpan",
    "LayerKV",
    "PackedAdapter",
    "Pages",
    "Quantized",
    "Run",
    "Site",
    "SiteSlab",
    "Slab",
    "Slot",
    "Weight",
    "backend",
    "lora",
]

log = logging.getLogger(__name__)

#: Values of LORAMILL_KERNELS; `cpu` is the best tier that the processor supports.
BACKENDS = ("reference", "torch", "cpu", "cpu-avx512", "cpu-avx512f", "cpu-avx2", "triton")
#: The device of each backend that runs on one kind of device only.
_DEVICES = {"cpu": "cpu", "cpu-avx512": "cpu", "cpu-avx512f": "cpu", "cpu-avx2": "cpu", "triton": "cuda"}


@functools.cache
def backend(device: str = "cpu") -> Backend:
    """The backend for a kind of device, selected once: the one in LORAMILL_KERNELS, or the best available.

    Without a C compiler, or on a processor without AVX2, the CPU's backend is `torch`, with a warning in the log.

    Raises:
        SettingsInvalid: LORAMILL_KERNELS is not a backend, or one that can't run here or on such a device.
    """
    name = os.environ.get("LORAMILL_KERNELS")
    if name is None:
        return _best(device)
    if name not in BACKENDS:
        raise SettingsInvalid(f"LORAMILL_KERNELS={name} is not a backend; use {', '.join(BACKENDS)}.")
    if _DEVICES.get(name, device) != device:
        raise SettingsInvalid(
            f"LORAMILL_KERNELS={name} doesn't run on {device}; unset it there, or use "
            f"{', '.join(other for other in BACKENDS if _DEVICES.get(other, device) == device)}."
        )
    try:
        return _open(name)
    except (SetupError, ImportError) as error:
        raise SettingsInvalid(f"LORAMILL_KERNELS={name} can't run here: {error}") from error


def lora(x: torch.Tensor, y: torch.Tensor, slab: SiteSlab, batch: Batch) -> None:
    """Applies each run's adapter to y in place.

    For every run of `batch` and every target module of its adapter at this site, with a [r, d_in], b [d_out, r]
    (scale folded in) and gain [d_out] (1 without DoRA), and sums in float32:

        y[rows, columns] = gain * (y[rows, columns] + x[rows] @ a.T @ b.T)

    Rows without an adapter, and columns of modules that an adapter does not target, are unchanged bit for bit. An
    adapter's weights affect its own rows only, even if they are NaN. y is the base's output before any bias (DoRA's
    gain scales the weights alone).

    Args:
        x: [rows, d_in] of the slab's dtype; its rows may be strided.
        y: [rows, sum of the site's widths], of x's dtype; may be a view of wider rows.
        slab: This site of a slab in the layout of the device's backend.
        batch: The adapter of each row.

    Raises:
        EngineFault: A run's slot has been freed, or shapes and dtypes do not match.
    """
    backend(x.device.type).lora(x, y, slab, batch)


def _best(device: str) -> Backend:
    if device == "cuda":
        try:
            return _open("triton")
        except ImportError:
            log.warning("triton isn't installed; adapters run on plain torch operations: `pip install triton`")
            return _open("torch")
    try:
        return _open("cpu")
    except SetupError as error:
        log.warning("native kernels can't run; falling back to plain torch operations: %s", error)
        return _open("torch")


def _open(name: str) -> Backend:
    if name == "triton":
        from loramill.kernels import triton

        return triton
    if name == "torch":
        from loramill.kernels import torch_backend

        return torch_backend
    if name == "reference":
        from loramill.kernels import reference

        return reference
    from loramill.kernels.cpu.native import open_native

    return open_native(name.removeprefix("cpu").removeprefix("-") or None)
