"""Renaming an adapter: everything that refers to it follows, in the caller's transaction."""

from __future__ import annotations

from sqlalchemy import delete as delete_from
from sqlalchemy import insert, literal, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import Conflict, InvalidRequest
from loramill.names import AdapterName
from loramill.registry import adapters
from loramill.registry.database.tables import (
    AdapterContentRow,
    AdapterDataRow,
    AdapterRow,
    AliasChangeRow,
    AliasRow,
    CompletionRow,
    EvaluationRow,
    JobRow,
    NightlyRunRow,
    NightlyStepRow,
    PrunedVersionRow,
    RolloutRow,
    SourceFileRow,
    VersionRow,
    VersionTrafficRow,
)
from loramill.types import AdapterRecord

#: Tables whose rows name their adapter; aliases come after versions, which `_copy_versions` copies first.
_OF_ADAPTER = (
    AliasRow,
    AliasChangeRow,
    EvaluationRow,
    NightlyStepRow,
    AdapterContentRow,
    AdapterDataRow,
    SourceFileRow,
    PrunedVersionRow,
    CompletionRow,
    RolloutRow,
    VersionTrafficRow,
)


def rename(session: Session, name: AdapterName, to: AdapterName) -> AdapterRecord:
    """Renames an adapter.

    Versions, aliases and their history, the pin, the retention, evaluations, new data, past nightly steps, rollouts,
    stored completions and jobs (running jobs as well) follow. Usage and audit rows keep the old name.

    Raises:
        NotFound: the adapter does not exist.
        InvalidRequest: the new name belongs to another tenant.
        Conflict: an adapter with the new name exists, or an open nightly run uses this adapter.
    """
    adapter = adapters.get(session, name)
    if to.tenant != name.tenant:
        raise InvalidRequest(
            f"'{name}' cannot be renamed to '{to}' of another tenant; write the new name as {name.tenant}/NAME.",
            param="to",
        )
    if to == name:
        return adapter
    # Jobs are locked before their adapter, in the order in which a worker that publishes locks the two.
    statement = select(JobRow).where(JobRow.tenant == name.tenant, JobRow.spec["adapter"].as_string() == str(name))
    jobs = session.scalars(
        statement.order_by(JobRow.id).with_for_update().execution_options(populate_existing=True)
    ).all()
    adapters.lock(session, name)
    _check_no_nightly_run(session, name)
    _copy_adapter(session, name, to)
    _copy_versions(session, name, to)
    for table in _OF_ADAPTER:
        session.execute(
            update(table).where(table.adapter == str(name)).values(adapter=str(to)),
            execution_options={"synchronize_session": False},
        )
    for row in jobs:
        row.spec = {**row.spec, "adapter": str(to)}
    session.flush()
    for deletion in (
        delete_from(VersionRow).where(VersionRow.adapter == str(name)),
        delete_from(AdapterRow).where(AdapterRow.name == str(name)),
    ):
        session.execute(deletion, execution_options={"synchronize_session": False})
    session.expire_all()
    return adapters.get(session, to)


def _check_no_nightly_run(session: Session, name: AdapterName) -> None:
    statement = select(NightlyStepRow.run).join(NightlyRunRow, NightlyRunRow.id == NightlyStepRow.run)
    run = session.scalar(
        statement.where(NightlyStepRow.adapter == str(name), NightlyRunRow.finished_at.is_(None)).limit(1)
    )
    if run is not None:
        raise Conflict(
            f"'{name}' cannot be renamed while the nightly run {run} uses it: wait until it has ended, or resume an "
            "interrupted run with `loramill nightly run`."
        )


def _copy_adapter(session: Session, name: AdapterName, to: AdapterName) -> None:
    old = session.get_one(AdapterRow, str(name))
    try:
        with session.begin_nested():
            session.add(
                AdapterRow(
                    name=str(to),
                    tenant=old.tenant,
                    created_at=old.created_at,
                    pinned=old.pinned,
                    retention=old.retention,
                )
            )
    except IntegrityError as error:
        raise Conflict(
            f"The adapter '{to}' already exists; delete it first, or choose another name.", param="to"
        ) from error


def _copy_versions(session: Session, name: AdapterName, to: AdapterName) -> None:
    # Aliases refer to adapter and version together, so the new pairs must exist before the aliases can follow.
    columns = [column for column in VersionRow.__table__.c if column.name != "adapter"]
    copied = select(literal(str(to)), *columns).where(VersionRow.adapter == str(name))
    session.execute(insert(VersionRow).from_select(["adapter", *(column.name for column in columns)], copied))
