"""Challengers of nightly runs that wait for a person: the question, and its answer. Each in the caller's transaction.

The question is a part of the result of the run's last step, so that a run that is killed asks once. The answer and the
move of the aliases are one transaction, which locks the adapter and then the step: of two people who answer at the same
time, one gets a conflict that names the other.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.errors import Conflict, NotFound
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.registry import adapters, nightly
from loramill.registry.database.tables import NightlyStepRow
from loramill.registry.rollouts import moves
from loramill.types import Alias, Approval, ApprovalState, StepStatus

#: The step that waits.
STAGE = "promote"


def list_waiting(session: Session, *, tenant: str | None = None, run: str | None = None) -> list[Approval]:
    """Returns what waits for approval, by adapter: all of it, or that of a tenant or a run."""
    statement = select(NightlyStepRow).where(NightlyStepRow.waits.is_(True)).order_by(NightlyStepRow.adapter)
    if tenant is not None:
        statement = statement.where(NightlyStepRow.adapter.startswith(f"{tenant}/", autoescape=True))
    if run is not None:
        statement = statement.where(NightlyStepRow.run == run)
    return [_approval(row) for row in session.scalars(statement)]


def supersede(session: Session, name: AdapterName | str, run: str) -> None:
    """Ends the wait of an adapter's challenger of another run, since that of `run` passed the gate.

    The caller has locked the adapter.
    """
    waiting = select(NightlyStepRow).where(NightlyStepRow.waits.is_(True), NightlyStepRow.adapter == str(name))
    for row in session.scalars(waiting.where(NightlyStepRow.run != run)).all():
        _record(session, _approval(row), ApprovalState.SUPERSEDED, by=run)


def approve(session: Session, run: str, name: AdapterName | str, *, by: str, note: str = "") -> Approval:
    """Lets a challenger that waits take over, as the definition of its run says: a promotion, a canary or a shadow.

    Args:
        session: a session that writes.
        run: the run that the challenger is of.
        name: the adapter.
        by: who approves: an API key, or `command line`.
        note: what this person writes about it.

    Raises:
        NotFound: the adapter, its version, or the question does not exist.
        Conflict: the question is answered already, the champion is not the one that the challenger was compared with,
            or the adapter is pinned.
    """
    waiting = _waiting(session, run, name)
    champion = adapters.get(session, name).champion
    if champion not in (waiting.champion, waiting.version):
        raise Conflict(
            f"The champion of {name} is now {_short(champion)}, and {run} compared {_short(waiting.version)} with "
            f"{_short(waiting.champion)}. `loramill nightly approve {run} {name} --reject` drops it, "
            f"`loramill promote {name}@{_short(waiting.version)}` promotes it all the same.",
            param="run",
        )
    reason = f"nightly run {run}: {waiting.reason}; approved by {by}"
    started = moves.introduce(session, name, waiting.version, waiting.introduction, run=run, reason=reason)
    changes = {"promoted": True} if started is None else {"rollout": started.value}
    return _record(session, waiting, ApprovalState.APPROVED, by=by, note=note, **changes)


def reject(session: Session, run: str, name: AdapterName | str, *, by: str, note: str = "") -> Approval:
    """Drops a challenger that waits: it is no longer the challenger, and its version is kept.

    Raises:
        NotFound: the adapter or the question does not exist.
        Conflict: the question is answered already, or a person has promoted the version meanwhile.
    """
    waiting = _waiting(session, run, name)
    adapter = adapters.get(session, name)
    if adapter.champion == waiting.version:
        raise Conflict(
            f"{_short(waiting.version)} is the champion of {name} already. `loramill nightly approve {run} {name}` "
            f"keeps it; to reject it, run `loramill rollback {name}` first.",
            param="run",
        )
    if adapter.challenger == waiting.version:
        adapters.move(session, name, Alias.CHALLENGER, None, f"nightly run {run}: rejected by {by}")
    return _record(session, waiting, ApprovalState.REJECTED, by=by, note=note)


def _waiting(session: Session, run: str, name: AdapterName | str) -> Approval:
    """Locks the adapter and the step, and returns the question."""
    adapters.lock(session, name)
    key = (run, str(name), STAGE)
    row = session.get(NightlyStepRow, key, with_for_update=True, populate_existing=True)
    if row is None or "approval" not in row.result:
        raise NotFound(
            f"Nothing of {name} in '{run}' waits for approval; `loramill nightly status` lists what does.", param="run"
        )
    found = _approval(row)
    if found.state is not ApprovalState.PENDING:
        raise Conflict(f"{_answered(found)} `loramill adapters show {name}` shows its versions.", param="run")
    return found


def _answered(found: Approval) -> str:
    version = f"{_short(found.version)} of {found.adapter}"
    if found.state is ApprovalState.SUPERSEDED:
        return f"{version} does not wait any more: the challenger of {found.decided_by} passed the gate after it."
    return f"{version} was {found.state} by {found.decided_by}."


def _record(
    session: Session, found: Approval, state: ApprovalState, *, by: str, note: str = "", **changes: Any
) -> Approval:
    decided = found.model_copy(
        update={"state": state, "decided_at": time.time(), "decided_by": by, "note": note},
    )
    (step,) = nightly.list_steps(session, found.run, stage=STAGE, adapter=found.adapter)
    champion = adapters.get(session, found.adapter).champion
    result = step.result | {"champion": champion, "approval": stored(decided)} | changes
    nightly.record_step(session, found.run, found.adapter, STAGE, StepStatus.DONE, result)
    return decided


def stored(approval: Approval) -> dict[str, Any]:
    """A question as the result of its step contains it."""
    return approval.model_dump(mode="json", exclude={"run", "adapter"})


def _approval(row: NightlyStepRow) -> Approval:
    return Approval(run=row.run, adapter=row.adapter, **row.result["approval"])


def _short(version: str | None) -> str:
    return "none" if version is None else version[:SHORT_HASH_LENGTH]
