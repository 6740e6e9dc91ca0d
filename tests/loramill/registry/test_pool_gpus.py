"""The kinds of GPU of the pool."""

from __future__ import annotations

from loramill.registry import Registry, pool_gpus
from loramill.types import GpuInfo

H100 = GpuInfo(name="NVIDIA H100", bytes=79 << 30, capability=(9, 0))
L4 = GpuInfo(name="NVIDIA L4", bytes=22 << 30, capability=(8, 9))


def test_the_smallest_gpu_that_was_seen_lately_counts(registry: Registry) -> None:
    week = pool_gpus.FORGET_SECONDS
    with registry.writing() as session:
        assert pool_gpus.smallest(session, now=0.0) is None
        pool_gpus.report(session, L4, now=1.0)
        pool_gpus.report(session, H100, now=2.0)
        pool_gpus.report(session, H100, now=week)
    with registry.reading() as session:
        assert pool_gpus.smallest(session, now=3.0) == L4
        assert pool_gpus.smallest(session, now=week + 1.5) == H100
        assert pool_gpus.smallest(session, now=3 * week) is None
    with registry.writing() as session:
        pool_gpus.report(session, L4, now=week)
        assert pool_gpus.smallest(session, now=week + 1.5) == L4
