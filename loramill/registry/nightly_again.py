"""Doing again what nightly runs have done: data that was used, or the stages of a run from one of them."""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from loramill.errors import Conflict, NotFound
from loramill.registry import nightly
from loramill.registry.database.tables import AdapterDataRow, NightlyRunRow, NightlyStepRow
from loramill.types import NewData


def backfill(session: Session, since: float) -> list[NewData]:
    """Makes data that was added since a time available to the next run again, with what was collected together with it.

    The data of a run that is open stays in that run.

    Args:
        session: a session that writes.
        since: seconds since the epoch.

    Returns:
        The new data of the adapters that have data of that time, used or not.
    """
    added = select(AdapterDataRow.run, AdapterDataRow.adapter).where(AdapterDataRow.created_at >= since).distinct()
    finished = set(session.scalars(select(NightlyRunRow.id).where(NightlyRunRow.finished_at.is_not(None))))
    found = session.execute(added).all()
    for run, adapter in found:
        if run in finished:
            nightly.release(session, run, adapter)
    names = {adapter for _, adapter in found}
    return [each for each in nightly.pending_data(session) if each.adapter in names]


def reopen_run(session: Session, run: str, stages: Collection[str]) -> list[str]:
    """Reopens a run, so that `nightly run` does some stages again with the results of the earlier ones.

    An adapter whose data was given back to the next run is left as it is.

    Args:
        session: a session that writes.
        run: the run.
        stages: the stages to do again.

    Returns:
        The adapters that take part.

    Raises:
        NotFound: there is no such run.
        Conflict: a run is open, this one or another, or no adapter has reached the stages.
    """
    last = _check_reopens(session, run)
    steps = nightly.list_steps(session, run)
    given_back = {step.adapter for step in steps if step.result.get("data") == "waiting" or "waiting" in step.result}
    adapters = sorted({step.adapter for step in steps if step.step in stages} - given_back)
    if not adapters:
        raise Conflict(f"No adapter of the nightly run {run} has reached these stages with data that is still its own.")
    forget_steps(session, run, adapters, stages)
    # It begins anew: it is the newest run, and its budget of time is not over already.
    last.open, last.finished_at, last.created_at = True, None, time.time()
    session.flush()
    return adapters


def forget_steps(session: Session, run: str, adapters: Collection[str], stages: Collection[str]) -> None:
    """Deletes the steps of some stages of a run, so that it does them again."""
    of_stages = (NightlyStepRow.run == run, NightlyStepRow.step.in_(stages), NightlyStepRow.adapter.in_(adapters))
    session.execute(delete(NightlyStepRow).where(*of_stages))


def _check_reopens(session: Session, run: str) -> NightlyRunRow:
    row = session.get(NightlyRunRow, run)
    if row is None:
        raise NotFound(f"There is no nightly run '{run}'; `loramill nightly history` lists them.", param="run")
    other = session.scalar(select(NightlyRunRow.id).where(NightlyRunRow.open.is_(True)))
    if other is not None:
        raise Conflict(f"The nightly run {other} is open: finish it by `loramill nightly run` first.")
    return row
