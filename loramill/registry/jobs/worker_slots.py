"""Worker slots: places in the pool, each held by one supervisor at a time.

A supervisor starts a session or a dedicated trainer only in a slot that it holds, and renews the slot while that runs.
Two supervisors at the same time therefore start nothing twice. The slots of a supervisor that disappeared, together
with what ran in them, are free once their time is over.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.registry.database.tables import WorkerSlotRow
from loramill.types import FrozenModel


class WorkerSlot(FrozenModel):
    """A held worker slot.

    Attributes:
        size: number of the pool's places that it takes.
        ending: its session takes no further job.
    """

    name: str
    holder: str
    size: int
    ending: bool


def list_held(session: Session, now: float) -> list[WorkerSlot]:
    """Returns the slots that are held now, by name."""
    statement = select(WorkerSlotRow).where(WorkerSlotRow.until > now).order_by(WorkerSlotRow.name)
    return [
        WorkerSlot(name=row.name, holder=row.holder, size=row.size, ending=row.ending)
        for row in session.scalars(statement)
    ]


def claim(session: Session, name: str, holder: str, *, now: float, seconds: float, size: int = 1) -> bool:
    """Takes a free slot; returns False if the slot is held."""
    row = session.get(WorkerSlotRow, name, with_for_update=True)
    if row is not None and row.until > now:
        return False
    if row is not None:
        session.delete(row)
        session.flush()
    try:
        with session.begin_nested():
            session.add(WorkerSlotRow(name=name, holder=holder, until=now + seconds, size=size, ending=False))
    except IntegrityError:
        return False  # another supervisor took it meanwhile
    return True


def renew(session: Session, holder: str, names: Collection[str], *, now: float, seconds: float) -> None:
    """Extends these slots of the holder to `now + seconds`, and frees its other slots."""
    own = WorkerSlotRow.holder == holder
    session.execute(update(WorkerSlotRow).where(own, WorkerSlotRow.name.in_(names)).values(until=now + seconds))
    session.execute(
        delete(WorkerSlotRow).where(or_(own & WorkerSlotRow.name.not_in(names), WorkerSlotRow.until <= now - seconds))
    )


def request_end(session: Session, name: str) -> None:
    """Makes the session in this slot end after its current job."""
    session.execute(update(WorkerSlotRow).where(WorkerSlotRow.name == name).values(ending=True))


def is_open(session: Session, name: str, holder: str) -> bool:
    """Returns whether this holder still has the slot and its session may take further jobs."""
    row = session.get(WorkerSlotRow, name)
    return row is not None and row.holder == holder and not row.ending
