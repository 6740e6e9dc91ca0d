"""The memory of a device, by its size or by the name of a GPU."""

from __future__ import annotations

import re

from loramill.errors import InvalidRequest

#: GiB that a program can use, by the name of the GPU.
GPU_GIB = {
    "l4": 22.0, "a10": 22.0, "a10g": 22.0, "3090": 23.5, "4090": 23.5, "5090": 31.3,
    "a100-40": 39.4, "l40s": 44.3, "a6000": 47.4, "a100": 79.1, "h100": 79.1, "h200": 139.7, "b200": 178.0,
}  # fmt: skip

#: GPUs older than compute capability 8.0, which are refused.
_TOO_OLD = ("t4", "v100")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|mb|mib)?", re.IGNORECASE)
_UNITS = {"gb": 2**30, "gib": 2**30, "mb": 2**20, "mib": 2**20}
#: Fraction of the size of a GPU that its driver leaves to a program.
_USABLE = 0.98


def gpu_bytes(text: str) -> int:
    """Bytes that a program can use on a GPU such as "24GB" or "h100"; the GB of a GPU are GiB.

    Raises:
        InvalidRequest: it is neither, or the GPU is too old.
    """
    name = text.lower().removeprefix("nvidia ").removeprefix("rtx ").removesuffix("-80")
    if name in _TOO_OLD:
        raise InvalidRequest(
            f"The GPU '{text}' has a compute capability below 8.0, which loramill needs; give a newer one.", param="gpu"
        )
    if gib := GPU_GIB.get(name):
        return round(gib * 2**30)
    return round(_USABLE * memory_bytes(text, f"or a GPU's name ({', '.join(GPU_GIB)})", "gpu"))


def accelerator_bytes(name: str | None) -> int | None:
    """Bytes that a program can use on a GPU by Ray's name for it, such as "L40S"; None if they are not known."""
    if name is None:
        return None
    # Ray has one name for the A100 with 40 GB and with 80 GB; what fits the smaller one fits both.
    key = {"a100": "a100-40"}.get(name.lower(), name.lower())
    gib = GPU_GIB.get(key)
    return None if gib is None else round(gib * 2**30)


def memory_bytes(text: str, hint: str = "for instance 16GB", param: str = "cpu") -> int:
    """Bytes of a size such as "16GB" (GiB).

    Raises:
        InvalidRequest: it is not a size.
    """
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        raise InvalidRequest(f"'{text}' is not a size of memory; give one such as 24GB, {hint}.", param=param)
    return round(float(size[1]) * _UNITS[(size[2] or "gb").lower()])
