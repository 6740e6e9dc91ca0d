"""Nights: which adapters have new data, and how far each has come. A run that was killed goes on where it was."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import and_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from loramill.data import new_data
from loramill.errors import NotFound
from loramill.names import AdapterName
from loramill.registry import adapters, datasets
from loramill.registry.database.tables import (
    AdapterDataRow,
    AliasRow,
    DatasetRow,
    JobRow,
    NightlyRunRow,
    NightlyStepRow,
)
from loramill.types import (
    AdapterData,
    Alias,
    DatasetRecord,
    NewData,
    NewDataState,
    NightlyRun,
    NightlyStep,
    SetAsideData,
    StepStatus,
)


def add_data(session: Session, name: AdapterName, train: str, valid: str | None) -> None:
    """Hands an adapter, made if there is none, datasets of its tenant to learn from in the next night.

    Raises:
        NotFound: the tenant, or a dataset of its own, doesn't exist.
    """
    adapters.get_or_create(session, name)
    for dataset in filter(None, (train, valid)):
        datasets.get(session, dataset, name.tenant)
    session.add(AdapterDataRow(adapter=str(name), train=train, valid=valid, created_at=time.time()))
    session.flush()


def list_data(session: Session, name: AdapterName) -> list[AdapterData]:
    """An adapter's data for nightly runs, newest first.

    Raises:
        NotFound: there is no such adapter.
    """
    adapters.get(session, name)
    failed = {row.id: str(step.result.get("error", "")) for _, step, rows in _failed(session, name) for row in rows}
    train, valid = aliased(DatasetRow), aliased(DatasetRow)
    statement = (
        select(AdapterDataRow, train, valid, NightlyRunRow.finished_at)
        .join(train, AdapterDataRow.train == train.id)
        .outerjoin(valid, AdapterDataRow.valid == valid.id)
        .outerjoin(NightlyRunRow, AdapterDataRow.run == NightlyRunRow.id)
        .where(AdapterDataRow.adapter == str(name))
        .order_by(AdapterDataRow.id.desc())
    )
    return [
        AdapterData(
            adapter=row.adapter,
            train=row.train,
            train_filename=file.filename,
            train_examples=file.examples,
            valid=row.valid,
            valid_filename=held_out.filename if held_out else None,
            created_at=row.created_at,
            run=row.run,
            used_at=finished_at,
            set_aside=failed.get(row.id),
        )
        for row, file, held_out, finished_at in session.execute(statement)
    ]


def pending_data(session: Session) -> list[NewData]:
    """The adapters with data that no night has collected, by name; their datasets in the order they came in."""
    statement = select(AdapterDataRow).where(AdapterDataRow.run.is_(None))
    rows = session.scalars(statement.order_by(AdapterDataRow.adapter, AdapterDataRow.id))
    return [_bundle(list(group)) for _, group in groupby(rows, key=attrgetter("adapter"))]


def new_data_state(session: Session, name: AdapterName | str, minimum: int) -> NewDataState:
    """The state of an adapter's data that no nightly run has collected yet.

    Args:
        minimum: examples that training needs at least, old and new together.

    Raises:
        NotFound: there is no such adapter.
    """
    champion = adapters.get(session, name).champion
    mine = select(AdapterDataRow).where(AdapterDataRow.adapter == str(name), AdapterDataRow.run.is_(None))
    rows = session.scalars(mine).all()
    job = session.get(JobRow, adapters.get_version(session, champion).job or "") if champion else None
    old = job.spec["train"] if job else ""
    sizes = datasets.example_counts(session, [old, *(file for row in rows for file in (row.train, row.valid) if file)])
    replay = min(new_data.REPLAY_EXAMPLES, sizes.get(old, 0))
    examples = sum(sizes.get(row.train, 0) for row in rows)
    validation = sum(sizes.get(row.valid, 0) for row in rows if row.valid)
    return NewDataState(
        adapter=str(name),
        examples=examples,
        validation_examples=validation,
        enough=examples >= new_data.required_examples(validation=bool(validation), replay=replay, minimum=minimum),
        outlook=new_data.outlook(examples, validation, replay=replay, minimum=minimum),
    )


def next_training_files(session: Session, name: AdapterName | str) -> list[DatasetRecord]:
    """The files that the next nightly run trains an adapter on, as far as it has them: the champion's and new ones."""
    champion = session.scalar(
        select(AliasRow.version).where(AliasRow.adapter == str(name), AliasRow.alias == Alias.CHAMPION)
    )
    job = session.get(JobRow, adapters.get_version(session, champion).job or "") if champion else None
    mine = select(AdapterDataRow.train).where(AdapterDataRow.adapter == str(name), AdapterDataRow.run.is_(None))
    ids = [*([job.spec["train"]] if job else []), *session.scalars(mine)]
    found = (session.get(DatasetRow, each) for each in ids)
    return [DatasetRecord.model_validate(row) for row in found if row is not None]


def collect(session: Session, run: str, name: AdapterName | str) -> NewData | None:
    """Marks an adapter's pending data as this run's, and returns all that the run has of it; None: nothing.

    Called again by the same run, it returns the same and what came in meanwhile.
    """
    mine = AdapterDataRow.adapter == str(name)
    session.execute(update(AdapterDataRow).where(mine, AdapterDataRow.run.is_(None)).values(run=run))
    statement = select(AdapterDataRow).where(mine, AdapterDataRow.run == run).order_by(AdapterDataRow.id)
    rows = session.scalars(statement).all()
    return _bundle(list(rows)) if rows else None


def release(session: Session, run: str, name: AdapterName | str) -> None:
    """Releases an adapter's data from a run, so that the next nightly run collects it again."""
    mine = (AdapterDataRow.adapter == str(name), AdapterDataRow.run == run)
    session.execute(update(AdapterDataRow).where(*mine).values(run=None))


def list_set_aside(session: Session, name: AdapterName | str | None = None) -> list[SetAsideData]:
    """The data that was set aside since nightly runs failed with it, of one adapter or of all."""
    return [
        SetAsideData(run=run, stage=step.step, reason=str(step.result.get("error", "")), **_bundle(rows).model_dump())
        for run, step, rows in _failed(session, name)
    ]


def retry(session: Session, name: AdapterName | str) -> NewData:
    """Lets the next nightly run collect an adapter's data that was set aside; returns that data.

    Raises:
        NotFound: none of its data is set aside.
    """
    found = [row for _, _, rows in _failed(session, name) for row in rows]
    if not found:
        raise NotFound(f"No data of '{name}' is set aside; `loramill nightly data` lists what waits.", param="adapter")
    for row in found:
        row.run = None
    session.flush()
    return _bundle(found)


def drop(session: Session, name: AdapterName | str) -> NewData:
    """Takes an adapter's data that waits or was set aside out of the nightly runs; its files stay. Returns that data.

    Raises:
        NotFound: it has none.
    """
    waiting = select(AdapterDataRow).where(AdapterDataRow.adapter == str(name), AdapterDataRow.run.is_(None))
    found = [row for _, _, rows in _failed(session, name) for row in rows]
    found += session.scalars(waiting.order_by(AdapterDataRow.id)).all()
    if not found:
        raise NotFound(f"'{name}' has no new data that waits or is set aside.", param="adapter")
    dropped = _bundle(found)
    for row in found:
        session.delete(row)
    session.flush()
    return dropped


def open_run(session: Session) -> NightlyRun:
    """The run that isn't finished, or a new one."""
    unfinished = select(NightlyRunRow).where(NightlyRunRow.open.is_(True))
    row = session.scalar(unfinished)
    if row is None:
        try:
            with session.begin_nested():
                session.add(NightlyRunRow(id=f"night-{secrets.token_hex(12)}", open=True, created_at=time.time()))
        except IntegrityError:
            session.expire_all()  # another process opened one meanwhile
        row = session.scalars(unfinished).one()
    return NightlyRun.model_validate(row)


def list_runs(session: Session, limit: int = 20) -> list[NightlyRun]:
    """The last runs, newest first."""
    statement = select(NightlyRunRow).order_by(NightlyRunRow.created_at.desc(), NightlyRunRow.id).limit(limit)
    return [NightlyRun.model_validate(row) for row in session.scalars(statement)]


def list_steps(session: Session, run: str) -> list[NightlyStep]:
    """The steps of a run in the order in which they began."""
    statement = select(NightlyStepRow).where(NightlyStepRow.run == run)
    rows = session.scalars(statement.order_by(NightlyStepRow.created_at, NightlyStepRow.adapter, NightlyStepRow.step))
    return [NightlyStep.model_validate(row) for row in rows]


def record_step(
    session: Session,
    run: str,
    adapter: AdapterName | str,
    step: str,
    status: StepStatus,
    result: Mapping[str, Any],
) -> NightlyStep:
    """Writes how a step stands, over what it said before; `result` is JSON with finite numbers."""
    now = time.time()
    row = session.get(NightlyStepRow, (run, str(adapter), step))
    if row is None:
        row = NightlyStepRow(run=run, adapter=str(adapter), step=step, created_at=now)
        session.add(row)
    row.status, row.result = status, dict(result)
    row.finished_at = None if status is StepStatus.PENDING else now
    session.flush()
    return NightlyStep.model_validate(row)


def finish_run(session: Session, run: str) -> NightlyRun:
    """Closes a run; the next night opens another.

    Raises:
        NotFound: there is no such run.
    """
    row = session.get(NightlyRunRow, run)
    if row is None:
        raise NotFound(f"There is no nightly run '{run}'.", param="run")
    if row.finished_at is None:
        row.open, row.finished_at = None, time.time()
        session.flush()
    return NightlyRun.model_validate(row)


def _failed(session: Session, name: AdapterName | str | None) -> list[tuple[str, NightlyStepRow, list[AdapterDataRow]]]:
    """Each run's data of an adapter that failed in it, with the failed step, by adapter and age."""
    failed = and_(
        NightlyStepRow.run == AdapterDataRow.run,
        NightlyStepRow.adapter == AdapterDataRow.adapter,
        NightlyStepRow.status == StepStatus.FAILED,
    )
    statement = select(NightlyStepRow, AdapterDataRow).join(AdapterDataRow, failed)
    if name is not None:
        statement = statement.where(AdapterDataRow.adapter == str(name))
    rows = session.execute(statement.order_by(AdapterDataRow.adapter, AdapterDataRow.run, AdapterDataRow.id)).all()
    grouped = groupby(rows, key=lambda row: (row[0].run, row[0]))
    return [(run, step, [row[1] for row in group]) for (run, step), group in grouped]


def _bundle(rows: list[AdapterDataRow]) -> NewData:
    return NewData(
        adapter=rows[0].adapter,
        train=tuple(row.train for row in rows),
        valid=tuple(row.valid for row in rows if row.valid is not None),
    )
