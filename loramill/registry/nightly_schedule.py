"""Which process works on the nightly run, and for which scheduled times runs began.

A process leases the run that is open and extends the lease while it works; each of its writes checks the lease. A
process that died is taken over when its lease has ended. A scheduled time is a row, so that it has one run although
several schedulers see it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import LeaseLost, NightlyBusy
from loramill.registry import nightly
from loramill.registry.database.tables import NightlyRunRow, NightlyTimeRow
from loramill.types import NightlyRun, ScheduledTime


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """What the registry knows about the schedule.

    Attributes:
        last_time: the newest row of scheduled times.
        last_run: the newest run.
        resumable: whether the newest run is open, began for a scheduled time, and no process works on it.
    """

    last_time: ScheduledTime | None
    last_run: NightlyRun | None
    resumable: bool


def lease_run(
    session: Session, holder: str, *, now: float, seconds: float, dead_holder: str | None = None
) -> NightlyRun:
    """Opens a run, or resumes the one that is open, and leases it.

    Args:
        session: a session that writes.
        holder: the process that works on it.
        now: seconds since the epoch.
        seconds: how long the lease lasts without `extend_lease`.
        dead_holder: a process that is known to be dead, whose lease does not count.

    Raises:
        NightlyBusy: another process has the lease.
    """
    run = nightly.open_run(session, now)
    free = or_(
        NightlyRunRow.lease_until.is_(None),
        NightlyRunRow.lease_until < now,
        NightlyRunRow.holder.in_([holder, dead_holder or holder]),
    )
    statement = update(NightlyRunRow).where(NightlyRunRow.id == run.id, NightlyRunRow.open.is_(True), free)
    found = session.execute(statement.values(holder=holder, lease_until=now + seconds).returning(NightlyRunRow.id))
    if found.first() is None:
        session.expire_all()
        raise NightlyBusy(
            f"The nightly run {run.id} is being worked on by {run.holder}; `loramill nightly status` shows how far it "
            "is. If that process has died, the run can be resumed within a minute."
        )
    session.expire_all()
    return nightly.get_run(session, run.id)


def extend_lease(session: Session, run: str, holder: str, *, now: float, seconds: float) -> None:
    """Extends a lease.

    Raises:
        LeaseLost: another process has the run.
    """
    statement = update(NightlyRunRow).where(NightlyRunRow.id == run, NightlyRunRow.holder == holder)
    found = session.execute(statement.values(lease_until=now + seconds))
    if not found.rowcount:  # type: ignore[attr-defined]  # results of these statements have it
        raise _lost(run, holder)


def end_lease(session: Session, run: str, holder: str) -> None:
    """Ends a lease, so that another process can resume the run at once; nothing if another one has it."""
    of_holder = (NightlyRunRow.id == run, NightlyRunRow.holder == holder)
    session.execute(update(NightlyRunRow).where(*of_holder).values(lease_until=None))


def schedule_state(session: Session, now: float) -> ScheduleState:
    """Returns what the registry knows about the schedule."""
    time_row = session.scalar(select(NightlyTimeRow).order_by(NightlyTimeRow.scheduled_at.desc()).limit(1))
    runs = nightly.list_runs(session, limit=1)
    run = runs[0] if runs else None
    idle = run is not None and run.finished_at is None and (run.lease_until or 0) < now
    scheduled = run is not None and session.scalar(
        select(NightlyTimeRow.run).where(NightlyTimeRow.run == run.id).limit(1)
    )
    return ScheduleState(
        last_time=None if time_row is None else ScheduledTime.model_validate(time_row),
        last_run=run,
        resumable=idle and scheduled,
    )


def begin_schedule(session: Session, schedule: str, now: float) -> None:
    """Records that a schedule begins, so that earlier times are not missed ones; empty: that there is none."""
    row = session.get(NightlyTimeRow, now)
    if row is None:
        session.add(NightlyTimeRow(scheduled_at=now, schedule=schedule, missed=0))
    else:
        row.schedule = schedule
    session.flush()


def claim_time(session: Session, time: ScheduledTime, now: float) -> NightlyRun | None:
    """Opens a run for a scheduled time, or lets the open run stand for it; None if another scheduler has done so."""
    try:
        with session.begin_nested():
            session.add(NightlyTimeRow(scheduled_at=time.scheduled_at, schedule=time.schedule, missed=time.missed))
    except IntegrityError:
        session.expire_all()
        return None
    run = nightly.open_run(session, now)
    session.execute(update(NightlyTimeRow).where(NightlyTimeRow.scheduled_at == time.scheduled_at).values(run=run.id))
    return run


def list_times(session: Session, run: str) -> list[ScheduledTime]:
    """Returns the scheduled times that a run stands for, oldest first."""
    statement = select(NightlyTimeRow).where(NightlyTimeRow.run == run).order_by(NightlyTimeRow.scheduled_at)
    return [ScheduledTime.model_validate(row) for row in session.scalars(statement)]


def _lost(run: str, holder: str) -> LeaseLost:
    return LeaseLost(f"Another process has taken over the nightly run {run} from {holder}, which was silent too long.")
