"""Devices that models run on."""

from __future__ import annotations

from loramill.types.base import FrozenModel


class GpuInfo(FrozenModel):
    """A GPU as torch or its driver reports it.

    Attributes:
        name: the product's name, such as "NVIDIA L4".
        bytes: memory that programs can use.
        capability: major and minor number of the compute capability.
    """

    name: str
    bytes: int
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} ({self.bytes / 2**30:.0f} GiB)"
