"""Places of the pool: who starts what.

A supervisor starts a session or a job's own trainer only under a name that it holds here, and holds it as long as that
runs. So two supervisors at once start nothing twice; and what a vanished one held, which vanished with it, is free
when its time is over.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.registry.database.tables import WorkerSlotRow
from loramill.types import FrozenModel


class WorkerSlot(FrozenModel):
    """A place that is held: `size` of the pool's, `ending` if its session is to take no further job."""

    name: str
    holder: str
    size: int
    ending: bool


def list_held(session: Session, now: float) -> list[WorkerSlot]:
    """The places held now, by name."""
    statement = select(WorkerSlotRow).where(WorkerSlotRow.until > now).order_by(WorkerSlotRow.name)
    return [
        WorkerSlot(name=row.name, holder=row.holder, size=row.size, ending=row.ending)
        for row in session.scalars(statement)
    ]


def claim(session: Session, name: str, holder: str, *, now: float, seconds: float, size: int = 1) -> bool:
    """Takes a place that nobody holds; False if somebody does."""
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
    """Holds these places of the holder for longer, and gives up its others."""
    mine = WorkerSlotRow.holder == holder
    session.execute(update(WorkerSlotRow).where(mine, WorkerSlotRow.name.in_(names)).values(until=now + seconds))
    session.execute(
        delete(WorkerSlotRow).where(or_(mine & WorkerSlotRow.name.not_in(names), WorkerSlotRow.until <= now - seconds))
    )


def request_end(session: Session, name: str) -> None:
    """Asks the session of this place to end when its job has ended."""
    session.execute(update(WorkerSlotRow).where(WorkerSlotRow.name == name).values(ending=True))


def is_open(session: Session, name: str, holder: str) -> bool:
    """Whether the place is still this holder's, and its session to take further jobs."""
    row = session.get(WorkerSlotRow, name)
    return row is not None and row.holder == holder and not row.ending
