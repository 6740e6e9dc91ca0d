"""New data of adapters, and the steps of nightly runs; a run that was killed resumes where it stopped."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import and_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from loramill.data import new_data
from loramill.errors import NotFound
from loramill.names import AdapterName
from loramill.registry import adapters, content, datasets
from loramill.registry.database.tables import (
    AdapterDataRow,
    AliasRow,
    DatasetRow,
    JobRow,
    NightlyRunRow,
    NightlyStepRow,
    VersionRow,
)
from loramill.types import (
    AdapterData,
    Alias,
    ApprovalState,
    DatasetRecord,
    NewData,
    NewDataState,
    NightlyRun,
    NightlyStep,
    SetAsideData,
    StepStatus,
)


def add_data(session: Session, name: AdapterName, train: str, valid: str | None) -> None:
    """Adds datasets of the tenant to an adapter's new data for the next nightly run; creates the adapter if needed.

    Raises:
        NotFound: the tenant does not exist, or does not have such a dataset.
    """
    adapters.get_or_create(session, name)
    for dataset in filter(None, (train, valid)):
        datasets.get(session, dataset, name.tenant)
    session.add(AdapterDataRow(adapter=str(name), train=train, valid=valid, created_at=time.time()))
    session.flush()


def list_data(session: Session, name: AdapterName) -> list[AdapterData]:
    """Returns an adapter's data for nightly runs, newest first.

    Raises:
        NotFound: the adapter does not exist.
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
    """Returns the new data that no nightly run has collected, by adapter; the datasets are in order of arrival."""
    statement = select(AdapterDataRow).where(AdapterDataRow.run.is_(None))
    rows = session.scalars(statement.order_by(AdapterDataRow.adapter, AdapterDataRow.id))
    return [_bundle(list(group)) for _, group in groupby(rows, key=attrgetter("adapter"))]


def new_data_state(
    session: Session,
    name: AdapterName | str,
    minimum: int,
    *,
    replay: int = new_data.REPLAY_EXAMPLES,
    held_out: float = new_data.HELD_OUT_FRACTION,
) -> NewDataState:
    """Returns the state of an adapter's new data that no nightly run has collected yet.

    Args:
        minimum: minimum number of examples for training, old and new together.
        replay: maximum number of old examples that a run trains on again.
        held_out: fraction of the new examples that a run holds out if they have no validation file.

    Raises:
        NotFound: the adapter does not exist.
    """
    adapters.get(session, name)
    statement = select(AdapterDataRow).where(AdapterDataRow.adapter == str(name), AdapterDataRow.run.is_(None))
    rows = session.scalars(statement).all()
    old = _champions_file(session, name) or ""
    sizes = datasets.example_counts(session, [old, *(file for row in rows for file in (row.train, row.valid) if file)])
    replayed = min(replay, sizes.get(old, 0))
    examples = sum(sizes.get(row.train, 0) for row in rows)
    validation = sum(sizes.get(row.valid, 0) for row in rows if row.valid)
    return NewDataState(
        adapter=str(name),
        examples=examples,
        validation_examples=validation,
        enough=examples
        >= new_data.required_examples(validation=bool(validation), replay=replayed, minimum=minimum, share=held_out),
        outlook=new_data.outlook(examples, validation, replay=replayed, minimum=minimum, share=held_out),
    )


def next_training_files(session: Session, name: AdapterName | str) -> list[DatasetRecord]:
    """Returns the existing files that the next nightly run trains an adapter on: the champion's, then new ones."""
    old = _champions_file(session, name)
    new = select(AdapterDataRow.train).where(AdapterDataRow.adapter == str(name), AdapterDataRow.run.is_(None))
    ids = [*([] if old is None else [old]), *session.scalars(new)]
    found = (session.get(DatasetRow, each) for each in ids)
    return [DatasetRecord.model_validate(row) for row in found if row is not None]


def collect(session: Session, run: str, name: AdapterName | str) -> NewData | None:
    """Assigns an adapter's new data to a run, and returns all data of the adapter in this run; None if there is none.

    Called again by the same run, it also returns what was added in the meantime.
    """
    of_adapter = AdapterDataRow.adapter == str(name)
    session.execute(update(AdapterDataRow).where(of_adapter, AdapterDataRow.run.is_(None)).values(run=run))
    statement = select(AdapterDataRow).where(of_adapter, AdapterDataRow.run == run).order_by(AdapterDataRow.id)
    rows = session.scalars(statement).all()
    return _bundle(list(rows)) if rows else None


def release_files(session: Session, run: str, name: AdapterName | str, files: Collection[str]) -> None:
    """Releases some files of an adapter's data from a run, so that the next run collects them again."""
    of_run = (AdapterDataRow.adapter == str(name), AdapterDataRow.run == run, AdapterDataRow.train.in_(files))
    session.execute(update(AdapterDataRow).where(*of_run).values(run=None))


def release(session: Session, run: str, name: AdapterName | str) -> None:
    """Releases an adapter's data from a run, so that the next run collects it again."""
    of_run = (AdapterDataRow.adapter == str(name), AdapterDataRow.run == run)
    session.execute(update(AdapterDataRow).where(*of_run).values(run=None))
    content.release(session, run, name)


def list_set_aside(session: Session, name: AdapterName | str | None = None) -> list[SetAsideData]:
    """Returns the data that was set aside because nightly runs failed with it, of one adapter or of all (None)."""
    return [
        SetAsideData(run=run, stage=step.step, reason=str(step.result.get("error", "")), **_bundle(rows).model_dump())
        for run, step, rows in _failed(session, name)
    ]


def retry(session: Session, name: AdapterName | str) -> NewData:
    """Makes an adapter's data that was set aside available to the next nightly run; returns that data.

    Raises:
        NotFound: the adapter has no data that is set aside.
    """
    found = [row for _, _, rows in _failed(session, name) for row in rows]
    if not found:
        raise NotFound(
            f"'{name}' has no data that is set aside; `loramill nightly data` lists new data.", param="adapter"
        )
    for row in found:
        _release_content(session, row)
        row.run = None
    session.flush()
    return _bundle(found)


def drop(session: Session, name: AdapterName | str) -> NewData:
    """Drops an adapter's new data, including what was set aside, from nightly runs; the files stay. Returns that data.

    Raises:
        NotFound: the adapter has no such data.
    """
    uncollected = select(AdapterDataRow).where(AdapterDataRow.adapter == str(name), AdapterDataRow.run.is_(None))
    found = [row for _, _, rows in _failed(session, name) for row in rows]
    found += session.scalars(uncollected.order_by(AdapterDataRow.id)).all()
    if not found:
        raise NotFound(f"'{name}' has no new data, and no data that is set aside.", param="adapter")
    dropped = _bundle(found)
    for row in found:
        _release_content(session, row)
        session.delete(row)
    session.flush()
    return dropped


def open_run(session: Session, now: float | None = None) -> NightlyRun:
    """Returns the run that is not finished, or a new run that begins `now` (None: by this machine's clock)."""
    unfinished = select(NightlyRunRow).where(NightlyRunRow.open.is_(True))
    row = session.scalar(unfinished)
    if row is None:
        began = time.time() if now is None else now
        try:
            with session.begin_nested():
                session.add(NightlyRunRow(id=f"nightly-{secrets.token_hex(12)}", open=True, created_at=began))
        except IntegrityError:
            session.expire_all()  # another process opened a run in the meantime
        row = session.scalars(unfinished).one()
    return NightlyRun.model_validate(row)


def list_runs(session: Session, limit: int = 20) -> list[NightlyRun]:
    """Returns the last runs, newest first."""
    statement = select(NightlyRunRow).order_by(NightlyRunRow.created_at.desc(), NightlyRunRow.id).limit(limit)
    return [NightlyRun.model_validate(row) for row in session.scalars(statement)]


def get_run(session: Session, run: str) -> NightlyRun:
    """Returns a run.

    Raises:
        NotFound: there is no such run.
    """
    row = session.get(NightlyRunRow, run)
    if row is None:
        raise NotFound(f"There is no nightly run '{run}'; `loramill nightly history` lists them.", param="run")
    return NightlyRun.model_validate(row)


def last_run(session: Session) -> NightlyRun | None:
    """Returns the newest run that is open or had work to do."""
    runs = list_runs(session)
    return next((each for each in runs if each.finished_at is None or list_steps(session, each.id)), None)


def list_steps(
    session: Session, run: str, *, stage: str | None = None, adapter: str | None = None
) -> list[NightlyStep]:
    """Returns the steps of a run, of one stage and one adapter if named, in the order in which they began."""
    statement = select(NightlyStepRow).where(NightlyStepRow.run == run)
    if stage is not None:
        statement = statement.where(NightlyStepRow.step == stage)
    if adapter is not None:
        statement = statement.where(NightlyStepRow.adapter == adapter)
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
    """Writes the status and the result of a step, replacing earlier ones; `result` is JSON with finite numbers.

    A step waits for a person if its result has a pending `approval`.
    """
    now = time.time()
    row = session.get(NightlyStepRow, (run, str(adapter), step))
    if row is None:
        row = NightlyStepRow(run=run, adapter=str(adapter), step=step, created_at=now)
        session.add(row)
    row.status, row.result = status, dict(result)
    row.finished_at = None if status is StepStatus.PENDING else now
    row.waits = True if result.get("approval", {}).get("state") == ApprovalState.PENDING else None
    session.flush()
    return NightlyStep.model_validate(row)


def finish_run(session: Session, run: str) -> NightlyRun:
    """Closes a run; the next call of `open_run` opens another one.

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


def _champions_file(session: Session, name: AdapterName | str) -> str | None:
    """The file of examples that the champion was trained on, or the version that it continues with preferences."""
    version = session.scalar(
        select(AliasRow.version).where(AliasRow.adapter == str(name), AliasRow.alias == Alias.CHAMPION)
    )
    while version is not None:
        row = session.get(VersionRow, (str(name), version))
        job = session.get(JobRow, row.job) if row is not None and row.job is not None else None
        if job is None:
            return None
        if job.spec.get("objective", "sft") == "sft":
            return str(job.spec["train"])
        version = job.spec.get("start_from")
    return None


def _failed(session: Session, name: AdapterName | str | None) -> list[tuple[str, NightlyStepRow, list[AdapterDataRow]]]:
    """Returns (run, failed step, data) of the adapters that failed in a run, by adapter and age."""
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


def _release_content(session: Session, row: AdapterDataRow) -> None:
    if row.run is not None:
        content.release(session, row.run, row.adapter)


def _bundle(rows: list[AdapterDataRow]) -> NewData:
    return NewData(
        adapter=rows[0].adapter,
        train=tuple(row.train for row in rows),
        valid=tuple(row.valid for row in rows if row.valid is not None),
    )
