"""The kinds of GPU in the pool: sessions report theirs when they start, and jobs are sized for the smallest.

The reports outlive the sessions, which end when there are no jobs: the next job is sized before a session starts.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.registry.database.tables import PoolGpuRow
from loramill.types import GpuInfo

#: Seconds after which a kind of GPU on which nothing has started no longer belongs to the pool.
FORGET_SECONDS = 7 * 24 * 3600.0


def report(session: Session, gpu: GpuInfo, *, now: float) -> None:
    """Records that a session or a trainer starts on a GPU."""
    row = session.get(PoolGpuRow, (gpu.name, gpu.bytes), with_for_update=True)
    if row is not None:
        row.last_seen_at = now
        return
    capability = ".".join(map(str, gpu.capability))
    try:
        with session.begin_nested():
            session.add(PoolGpuRow(name=gpu.name, bytes=gpu.bytes, capability=capability, last_seen_at=now))
    except IntegrityError:
        return  # another session on such a GPU started at the same time


def smallest(session: Session, *, now: float) -> GpuInfo | None:
    """Returns the GPU with the least memory on which something started in the last seven days."""
    recent = select(PoolGpuRow).where(PoolGpuRow.last_seen_at > now - FORGET_SECONDS)
    row = session.scalars(recent.order_by(PoolGpuRow.bytes, PoolGpuRow.name).limit(1)).first()
    if row is None:
        return None
    major, minor = row.capability.split(".")
    return GpuInfo(name=row.name, bytes=row.bytes, capability=(int(major), int(minor)))
